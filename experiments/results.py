"""Write docs/results.md from results/, and fill the marked tables of README and docs.

    python -m experiments.results

A page marks a table by `<!-- results:NAME -->` ... `<!-- /results -->`. A table whose results file
does not exist is left as it stands. docs/results.md opens with results/conclusions.md: five
sentences and what stands behind them, written by hand after the tables are recorded. Other numbers
that were typed say so: "(By hand.)"

A file has cells with seeds, {label: {seed: {column: number}}}, or named tables: of rows, or of
cells again.
"""
import math
import re
import sys
from pathlib import Path

import numpy as np

from configurator import run_command
from engine.jsonl import atomic, read_object

ROOT = Path(__file__).resolve().parent.parent
ORDER = ("default_run", "baselines", "small", "figure1", "real", "real_ideas", "table4",
         "table4_first", "table12", "table12_first", "table12_again", "curve", "sec32", "clr",
         "sec34", "table6", "questions", "exercises", "random_replacements", "bench_cpu",
         "bench_cpu_intel", "bench_gpu")
ROUNDS = {"table12": ("table12_first", "table12_again"), "table4": ("table4_first",)}   # earlier
MARK = re.compile(r"(<!-- results:(\w+) -->\n)(.*?)(<!-- /results -->)", re.DOTALL)
# t with P(|T| < t) = 0.95 for Student's distribution of 1 to 9 degrees of freedom
T_95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


# ---------------------------------------------------------------- intervals over seeds

def interval(values):
    """Return (mean, half the width of its 95 % interval), NaN for a single value.

    Of more than ten values the interval is a little too wide.
    """
    values = np.asarray(list(values), dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return mean, math.nan
    return mean, T_95[min(n, 10) - 2] * float(values.std(ddof=1)) / math.sqrt(n)


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

    >>> [cell(v) for v in (None, 1503, 70.456, (70.4, 0.25), "x | y")]
    ['', '1,503', '70.5', '70.4 ± 0.2', 'x \\\\| y']
    """
    if value is None:
        return ""
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


# ---------------------------------------------------------------- a file as Markdown

def mean_of(table, labels, column):
    """Return {seed: mean over some cells of a column}, of the seeds that all of them have."""
    scores = [{seed: row[column] for seed, row in table["cells"][label].items() if column in row}
              for label in labels]
    seeds = set.intersection(*map(set, scores))
    return {seed: sum(part[seed] for part in scores) / len(scores) for seed in sorted(seeds)}


def differences(table, columns):
    """Return [{"": name, column: paired difference}] of a table of cells."""
    return [{"": counted(table, name, [*plus, *minus]),
             **{c: difference(paired(ours, other)) for c in columns
                if (ours := mean_of(table, plus, c)) and (other := mean_of(table, minus, c))}}
            for name, (plus, minus) in table.get("differences", {}).items()
            if set.intersection(*(set(table["cells"][label]) for label in plus + minus))]


def counted(table, name, labels):
    """Return a name, and how many seeds there are of its cells if not all of the table's."""
    n = len(set.intersection(*(set(table["cells"][label]) for label in labels)))
    return name if n == len(table["seeds"]) else f"{name} ({n} seed{'s' * (n > 1)})"


def cells_lines(table):
    """Return a table of cells as Markdown: mean and interval, the paper's, paired differences."""
    labels = [label for label, seeds in table["cells"].items() if seeds]
    columns = list(dict.fromkeys(c for label in labels for row in table["cells"][label].values()
                                 for c in row))
    rows = [{"": counted(table, label, [label]),
             **{c: interval(values.values()) for c in columns
                if (values := mean_of(table, [label], c))},
             **{f"paper {c}": v for c, v in table.get("paper", {}).get(label, {}).items()}}
            for label in labels]
    changes = differences(table, columns)
    if table.get("transpose"):
        rows, changes = [{"": c, **{row[""]: row.get(c) for row in rows},
                          **{change[""]: change.get(c) for change in changes}}
                         for c in columns], []
    head = f"Seeds {', '.join(map(str, table['seeds']))}. Mean and 95 % interval."
    if len(table["seeds"]) == 1:
        head = f"Seed {table['seeds'][0]}."
    if "differences" in table:
        head += " Differences are paired by seed, and bold beyond their interval."
    lines = [head, "", *markdown(rows), ""]
    if changes:
        lines += [*markdown(changes), ""]
    return lines + [f"- {name}: {lm['tokens'] / 1e6:.1f}M tokens, loss {lm['loss']:.2f} on dev."
                    for name, lm in table.get("language_models", {}).items()]


def lines_of(table):
    """Return the Markdown of a results file without its title."""
    if "cells" in table:
        return cells_lines(table)
    lines = []
    for caption, rows in table["tables"].items():
        lines += [f"{caption}:", ""] if len(table["tables"]) > 1 else []
        lines += [*(lines_of(rows) if "cells" in rows else markdown(rows)), ""]
    return lines


def by_language_model(table, plus, minus, column):
    """Return a difference for each language model of a table: the mean over its seeds.

    Seed s has language model s % their number.
    """
    ours, other = (mean_of(table, labels, column) for labels in (plus, minus))
    count, values = len(table["language_models"]), {}
    for seed in ours.keys() & other.keys():
        values.setdefault(int(seed) % count, []).append(ours[seed] - other[seed])
    return [float(np.mean(values[lm])) for lm in sorted(values)]


def rounds(tables, last):
    """Return the rows of a table's differences over its rounds; intervals are over language models.

    last: the name of its last round.
    A column is one that all rounds have. With three rounds a second row leaves out the first one.
    """
    rows, parts = [], [tables[part] for part in (*ROUNDS[last], last) if part in tables]
    columns = dict.fromkeys(c for row in tables[last]["cells"].values()
                            for values in row.values() for c in values)
    for label, (plus, minus) in tables[last]["differences"].items():
        own = [part for part in parts if {*plus, *minus} <= part["cells"].keys()]
        choices = {label: own}
        if len(own) > 2:
            choices[f"{label}, without the first round"] = own[1:]
        for name, some in choices.items():
            values = {c: [by_language_model(part, plus, minus, c) for part in some]
                      for c in columns}
            values = {c: sum(each, []) for c, each in values.items() if all(each)}
            rows.append({"": name,
                         "models": max(map(len, values.values()), default=0),
                         **{c: difference(interval(each)) for c, each in values.items()}})
    return rows


# ---------------------------------------------------------------- pages

def read_results(folder):
    """Return {name: content} of the results files that exist, in the order of `ORDER`."""
    return {name: read_object(path) for name in (*ORDER, "rehearsal")
            if (path := Path(folder) / f"{name}.json").is_file()}


def blocks(tables):
    """Return {mark: lines} of the tables that pages ask for by name."""
    lines = {name: lines_of(table) for name, table in tables.items()}
    if "table4" in tables:
        columns = ("Multi", "Eng", "Zh")
        rows = [{"with minus without": row[""].partition(":")[0].replace("SM", "soft mask"),
                 **{c: row.get(c) for c in columns}}
                for row in differences(tables["table4"], columns)
                if ": with minus without" in row[""]]
        lines["ideas"] = [*markdown(rows), "", "Points of nDCG@10; Multi is the mean of 25 "
                          "languages other than English. Bold is beyond the interval."]
    for name, table in tables.get("exercises", {}).get("tables", {}).items():
        lines[f"exercise_{name}"] = lines_of(table)
    for name, rows in tables.get("rehearsal", {}).get("tables", {}).items():
        lines[name] = markdown(rows)
    return lines


def fill(text, lines):
    """Return a page with its marked tables filled; those that `lines` lacks stay."""
    def replace(match):
        start, name, before, end = match.groups()
        body = "\n".join(lines[name]).strip() + "\n" if name in lines else before
        return f"{start}{body}{end}"
    return MARK.sub(replace, text)


def results_page(tables, folder):
    """Return docs/results.md."""
    path = Path(folder) / "conclusions.md"
    lines = ["# Results", "", path.read_text("utf-8").strip() if path.is_file() else
             "*No conclusion recorded yet.*", "",
             "`python -m experiments.results` generates this page from `results/`.",
             "Intervals are over seeds, with the questions fixed. They take seeds for independent, "
             "also where some share a language model, or the order of their rows (see the log).",
             "Where nothing differs, one difference in twenty is bold all the same.", ""]
    for name, table in tables.items():
        if name in ("rehearsal", "exercises"):     # docs/scale.md and docs/exercises.md have them
            continue
        lines += [f"## {table.get('title', name.replace('_', ' ').capitalize())}", ""]
        lines += [*lines_of(table), ""]
        if {*ROUNDS.get(name, ())} & tables.keys():
            lines += ["With the earlier rounds. Intervals are over language models, a value each:",
                      "", *markdown(rounds(tables, name)), ""]
        lines += [*(f"- {note}" for note in table.get("notes", ())), ""]
        if "command" in table:
            lines += [f"Written by `{table['command']}`.", ""]
    figures = sorted(Path(folder, "figures").glob("*.png"))
    if figures:
        lines += ["## Figures", "",
                  "Drawn by `python -m experiments.figures`: the curve and Figure 1 from tables "
                  "above, all others from one default run.", ""]
        lines += [f"![{path.stem}](../results/figures/{path.name})\n" for path in figures]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


def stale(root=ROOT):
    """Return {path: the text that results/ asks for} of README and docs, where it differs."""
    tables, page = read_results(Path(root) / "results"), Path(root) / "docs" / "results.md"
    lines, paths = blocks(tables), [Path(root) / "README.md", *sorted(Path(root).glob("docs/*.md"))]
    texts = {path: fill(path.read_text("utf-8"), lines) for path in paths}
    texts[page] = results_page(tables, Path(root) / "results")
    return {path: text for path, text in texts.items()
            if not path.is_file() or path.read_text("utf-8") != text}


def main():
    """Write all pages; with any argument, `--help` say, write none and say what this is."""
    if len(sys.argv) > 1:
        sys.exit(print(__doc__))
    for path, text in stale().items():
        with atomic(path) as file:
            file.write(text)
        print(f"wrote {path}")


if __name__ == "__main__":
    run_command(main)
