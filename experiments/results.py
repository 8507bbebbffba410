"""Write docs/results.md from results/, and fill the marked tables of README and docs.

    python -m experiments.results                        # all pages
    python -m experiments.results record --name=default_run --runs=out,out/seed1,out/seed2

A page marks a table by `<!-- results:NAME -->` ... `<!-- /results -->`. A table whose results file
does not exist is left as it stands. docs/results.md opens with results/conclusions.md: five
sentences, written by hand after the tables are recorded. No other number or table is typed.

Three forms of files: cells with seeds (experiments/ablation.py), named tables of rows, and the
summaries of whole runs, which `record` joins from each run's summary.json.
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import load_config
from engine.jsonl import atomic

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("default_run", "baselines", "small", "real", "table4", "table12", "curve", "sec32",
         "sec34", "table6", "mkqa", "table5", "numbers", "questions", "exercises", "bench_cpu",
         "bench_gpu")
RUN_COLUMNS = {                    # column of a run's table: (start, end) of the score's key
    "LM loss": ("lm/", "/loss"), "nDCG@10": ("retrieval/", "/test/ndcg@10"),
    "R@1": ("retrieval/", "/test/recall@1"), "R@10": ("retrieval/", "/test/recall@10"),
    "26 languages": ("retrieval/clr_test/mean/", "/ndcg@10"), "STS": ("sts/", "/spearman"),
    "classes": ("classification/", "/accuracy")}
RUN_ROWS = ("BM25", "pretrain", "sft", "embed_weak", "embed_sup")
MARK = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)


# ---------------------------------------------------------------- intervals over seeds

def t_quantile(df, level=0.95):
    """Return t with P(|T| < t) = level for Student's distribution of `df` degrees of freedom.

    With T = sqrt(df) tan(x) the density is cos(x)^(df - 1), integrated here on a fine grid.

    >>> [round(t_quantile(df), 3) for df in (1, 4, 30)]
    [12.706, 2.776, 2.042]
    """
    x = np.linspace(0, math.pi / 2, 200_001)
    density = np.cos(x) ** (df - 1)
    mass = np.r_[0, np.cumsum(density[1:] + density[:-1])]
    return math.sqrt(df) * math.tan(float(np.interp(level * mass[-1], mass, x)))


def interval(values):
    """Return (mean, half the width of its 95 % interval), NaN for a single value."""
    values = np.asarray(list(values), dtype=np.float64)
    if len(values) < 2:
        return float(values.mean()), math.nan
    return float(values.mean()), t_quantile(len(values) - 1) * float(
        values.std(ddof=1)) / math.sqrt(len(values))


def paired(ours, other):
    """Return the interval of ours[seed] - other[seed] over the seeds that both have."""
    return interval([ours[seed] - other[seed] for seed in sorted(ours.keys() & other.keys())])


# ---------------------------------------------------------------- Markdown

def number(value, like=None):
    """Write a float with as many digits as the size of `like`, itself by default, deserves."""
    size = abs(value if like is None else like)
    return f"{value:,.{1 if size >= 10 else 2 if size >= 1 else 3}f}"


def cell(value):
    """Write a value as Markdown; a pair is a mean and half the width of its interval.

    >>> [cell(v) for v in (None, 1503, 70.456, True, (70.4, 0.25), "x | y")]
    ['', '1,503', '70.5', '✓', '70.4 ± 0.2', 'x \\\\| y']
    """
    if value is None:
        return ""
    if isinstance(value, bool):
        return "✓" if value else "✗"
    if isinstance(value, (tuple, list)):
        mean, half = value
        if math.isnan(half):
            return number(mean)
        size = max(abs(mean), half)
        return f"{number(mean, size)} ± {number(half, size)}"
    if isinstance(value, float):
        return number(value)
    return f"{value:,}" if isinstance(value, int) else str(value).replace("|", "\\|")


def markdown(rows):
    """Return rows, dicts of the same or other columns, as the lines of a Markdown table."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[cell(name) for name in names], ["---"] * len(names)]
    lines += [[cell(row.get(name)) for name in names] for row in rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def difference(values):
    """Write a paired difference (mean, half); bold if it exceeds its interval."""
    mean, half = values
    text = ("+" if mean >= 0 else "-") + cell((abs(mean), half))
    return f"**{text}**" if abs(mean) > max(half, 1e-9) else text


# ---------------------------------------------------------------- the three forms

def mean_of(table, labels, column):
    """Return {seed: mean over some cells of a column}, of the seeds that all of them have."""
    scores = [{seed: row[column] for seed, row in table["cells"][label].items() if column in row}
              for label in labels]
    seeds = set.intersection(*map(set, scores))
    return {seed: sum(part[seed] for part in scores) / len(scores) for seed in sorted(seeds)}


def differences(table, columns):
    """Return [{"": name, column: paired difference}] of a table of cells."""
    return [{"": name, **{c: difference(paired(ours, other)) for c in columns
                          if (ours := mean_of(table, plus, c))
                          and (other := mean_of(table, minus, c))}}
            for name, (plus, minus) in table.get("differences", {}).items()]


def cells_lines(table):
    """Return a table of cells as Markdown: mean and interval, the paper's, paired differences."""
    labels = [label for label, seeds in table["cells"].items() if seeds]
    columns = list(dict.fromkeys(c for label in labels for row in table["cells"][label].values()
                                 for c in row))
    rows = [{"": label, **{c: interval(values.values()) for c in columns
                           if (values := mean_of(table, [label], c))},
             **{f"paper {c}": v for c, v in table.get("paper", {}).get(label, {}).items()}}
            for label in labels]
    changes = differences(table, columns)
    if table.get("transpose"):
        rows, changes = [{"": c, **{row[""]: row.get(c) for row in rows},
                          **{change[""]: change.get(c) for change in changes}}
                         for c in columns], []
    lines = [f"Seeds {', '.join(map(str, table['seeds']))}. Mean and 95 % interval. Differences "
             "are paired by seed, and bold beyond their interval.", "", *markdown(rows), ""]
    if changes:
        lines += [*markdown(changes), ""]
    for name, lm in table.get("language_models", {}).items():
        lines += [f"- {name}: {lm['tokens'] / 1e6:.1f}M tokens, loss {lm['loss']:.2f} on dev."]
    return lines


def mean_score(runs, label, start, end):
    """Return the interval over runs of the score whose key has this start and end, or None."""
    values = [next((v for k, v in run.get(label, {}).items()
                    if k.startswith(start) and k.endswith(end)), None) for run in runs]
    values = [v for v in values if v is not None]
    return interval(values) if values else None


def runs_lines(table):
    """Return the summaries of some runs as Markdown: a row for each stage, then MRL's dims."""
    runs, rows = table["runs"], []
    for label in RUN_ROWS:
        row = {name: mean_score(runs, label, *key) for name, key in RUN_COLUMNS.items()}
        if any(row.values()):
            rows.append({"": label, **row})
    used = [name for name in RUN_COLUMNS if any(row.get(name) for row in rows)]
    lines = markdown([{"": row[""], **{name: row[name] for name in used}} for row in rows])
    dims = sorted({int(key.partition(":")[2]) for run in runs for key in run.get("embed_sup", {})
                   if "/ndcg@10:" in key})
    if dims:
        lines += ["", *markdown([{"first dims": "nDCG@10", **{str(dim): mean_score(
            runs, "embed_sup", "retrieval/", f"/test/ndcg@10:{dim}") for dim in dims}}])]
    minutes = [run["minutes"] for run in runs]
    return [*lines, "", f"{len(runs)} runs, {min(minutes):.0f} to {max(minutes):.0f} minutes on "
            f"{runs[0]['cores']} cores."]


def bench_lines(table):
    """Return the rows of the bench as Markdown."""
    rows = [{"": name, **{key: row.get(key) for key in ("measured", "spread", "floor", "goal",
                                                        "met", "what")}}
            for name, row in table["rows"].items()]
    return [f"Machine: {', '.join(f'{k} {v}' for k, v in table['machine'].items())}.", "",
            *markdown(rows)]


def lines_of(table):
    """Return the Markdown of a results file, whatever its form, without its title."""
    if "cells" in table:
        return cells_lines(table)
    if "runs" in table:
        return runs_lines(table)
    if "machine" in table:
        return bench_lines(table)
    lines = []
    for caption, rows in table["tables"].items():
        lines += [f"{caption}:", ""] if len(table["tables"]) > 1 else []
        lines += [*markdown(rows), ""]
    return lines


# ---------------------------------------------------------------- pages

def write_result(folder, name, result):
    """Write FOLDER/NAME.json and return its path."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    path = Path(folder) / f"{name}.json"
    with atomic(path) as file:
        file.write(json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    return path


def read_results(folder):
    """Return {name: content} of the results files that exist, in the order of `ORDER`."""
    return {name: json.loads(path.read_text("utf-8")) for name in ORDER
            if (path := Path(folder) / f"{name}.json").is_file()}


def blocks(tables):
    """Return {mark: lines} of the tables that pages ask for by name."""
    found = {name: lines_of(table) for name, table in tables.items()}
    if "table4" in tables:
        ideas = dict(zip(("soft mask", "CLR", "DHNM"),
                         differences(tables["table4"], ("Multi", "Eng", "Zh"))))
        rows = [{"with minus without": idea, **{c: row.get(c) for c in ("Multi", "Eng", "Zh")}}
                for idea, row in ideas.items()]
        found["ideas"] = [*markdown(rows), "", "nDCG@10 in percent. Bold is beyond the interval."]
    for name, rows in tables.get("exercises", {}).get("tables", {}).items():
        found[f"exercise_{name}"] = markdown(rows)
    return found


def fill(text, found):
    """Return a page with its marked tables filled; those that are not in `found` stay."""
    def replace(match):
        start, name, before, end = match.groups()
        body = "\n".join(found[name]).strip() + "\n" if name in found else before
        return f"{start}{body}{end}"
    return MARK.sub(replace, text)


def results_page(tables, folder):
    """Return docs/results.md."""
    path = Path(folder) / "conclusions.md"
    lines = ["# Results", "", path.read_text("utf-8").strip() if path.is_file() else
             "*No conclusion recorded yet.*", "",
             "`python -m experiments.results` generates this page from `results/`.", ""]
    for name, table in tables.items():
        lines += [f"## {table.get('title', name.replace('_', ' ').capitalize())}", ""]
        lines += [*lines_of(table), ""]
        lines += [*(f"- {note}" for note in table.get("notes", ())), ""]
        if "command" in table:
            lines += [f"Written by `{table['command']}`.", ""]
    figures = sorted(Path(folder, "figures").glob("*.png"))
    if figures:
        lines += ["## Figures", ""]
        lines += [f"![{path.stem}](../results/figures/{path.name})\n" for path in figures]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def pages(root=ROOT):
    """Return {path: text that it should have} of README, docs, and docs/results.md."""
    folder = Path(root) / "results"
    tables = read_results(folder)
    found = blocks(tables)
    texts = {path: fill(path.read_text("utf-8"), found) for path in
             (Path(root) / "README.md", *sorted(Path(root, "docs").glob("*.md"))) if path.is_file()}
    return texts | {Path(root) / "docs" / "results.md": results_page(tables, folder)}


def stale(root=ROOT):
    """Return the pages that differ from what results/ says."""
    return [path for path, text in pages(root).items()
            if not path.is_file() or path.read_text("utf-8") != text]


@dataclass(frozen=True)
class RecordConfig:
    """The settings of `python -m experiments.results record`."""
    name: str = "default_run"              # results/NAME.json
    runs: tuple[str, ...] = ("out",)       # folders of train.py, a seed each
    results: str = "results"


def record(cfg):
    """Join the summary.json of some runs to RESULTS/NAME.json; return its path."""
    runs = [json.loads((Path(run) / "summary.json").read_text("utf-8")) for run in cfg.runs]
    return write_result(cfg.results, cfg.name, {"runs": runs})


def main(argv=None):
    """Write all pages, or record runs."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if argv[:1] == ["record"]:
        return print(record(load_config(RecordConfig, argv[1:])))
    for path in stale():
        text = pages()[path]
        with atomic(path) as file:
            file.write(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.results: error: {error}")
