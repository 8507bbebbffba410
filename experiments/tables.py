"""The paper's figures and tables, made from what runs have left behind; nothing is trained here.

    python -m experiments.tables figures                        # the run in out/
    python -m experiments.tables figures --out=out/mine --figures=out/mine/figures
    python -m experiments.tables figures --out=out,out/small    # more runs: more points in Figure 1

loss, mask (alpha and rank of M, PAPER Sec. 3.2), dhnm (Sec. 3.4), mrl, figure1 (score against
size), figure3 (languages before and after CLR), each a PNG. They read log.jsonl, eval.json and the
checkpoints of a run's stages, its summary.json, and what `eval.py --out=results/NAME.json` wrote.
A figure whose data is not there says what is missing and which command makes it.
DEVIATES: Figure 1 shows the sizes and scores that are at hand, not MTEB's; Figure 3 shows principal
components, which move no point, where the paper does not say how it came down to two dimensions.
"""
import importlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path

from configurator import load_config
from data import read_jsonl
from embed import Embedder
from experiments.runs import Missing, Run
from mask import effective_rank, mask_rank, soft_mask
from tasks import language_separation, scatter_languages
from train import STAGES

WEAK, SUP = STAGES[2:]
COLLECTION = "retrieval/installed_docs/test"       # whose score Figure 1 shows, if a run has it
METRIC = "ndcg@10"
LARGEST = 120_000                                  # bytes of a picture, as they are under git


@dataclass(frozen=True)
class TablesConfig:
    """The settings of `python -m experiments.tables COMMAND`."""
    out: tuple[str, ...] = ("out",)    # folders of train.py; the figures show the first
    results: str = "results"           # folder with recorded scores, *.json of eval.py
    figures: str = "results/figures"   # folder to write pictures to
    texts: str = ""                    # Figure 3's {text, lang} rows; empty: queries of clr_test
    scale: str = "toy"                 # of the trained tables: toy, or real with a root
    root: str = ""                     # real: a folder of public sets (sets.py)
    docs: str = "out/installed_docs"   # toy: the embedded corpus
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    work: str = "out/tables"           # where the cells of a table are trained
    sentence_transformer: tuple[str, ...] = ()  # of the scored tables: stock models beside ours
    collection: str = ""               # Tables 3, 8, 9, 13: queries in many languages, for English
    zero_shot: str = "out/zero_shot"   # Table 2: the run whose stage 4 saw some of the sets only


# ---------------------------------------------------------------- what a run left behind

def by_task(rows, key):
    """Return {task: ([step ..], [value ..])} of the rows of a log that have `key`."""
    curves = {}
    for row in rows:
        if row.get(key) is not None:
            steps, values = curves.setdefault(row["task"], ([], []))
            steps.append(row["step"])
            values.append(row[key])
    return curves


def mrl_curves(scores, metric=METRIC):
    """Return {"set, subset": {dim: score}} of collections scored at several dims.

    Of a set in several languages only the mean is there.
    """
    curves = {}
    for key, value in scores.items():
        where, _, dim = key.partition(":")
        if dim and where.count("/") == 3 and where.endswith(f"/{metric}"):
            _, name, subset, _ = where.split("/")
            curves.setdefault(name, {}).setdefault(subset, {})[int(dim)] = value
    return {f"{name}, {subset}": dict(sorted(curve.items()))
            for name, subsets in curves.items() for subset, curve in subsets.items()
            if subset == "mean" or "mean" not in subsets}


def recorded(folder):
    """Return {file's stem: flat scores} of the JSON files that eval.py wrote to a folder."""
    found = {}
    for path in sorted(Path(folder).glob("*.json")):
        scores = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(scores, dict) and any(key.count("/") == 3 for key in scores):
            found[path.stem] = scores
    return found


def sizes_and_scores(runs, results):
    """Return ({label: (parameters, score)}, {label: score of what has no size}, what is scored).

    Runs give their two embedding stages. Recorded files give what eval.py scored; the size is its
    "model/NAME/all/parameters".
    """
    where = next((key for run in runs for stage in (SUP, WEAK) for key in scores_of(run, stage)
                  if key.startswith(COLLECTION.split("/")[0]) and key.endswith(f"/{METRIC}")), None)
    if where is None:
        raise Missing(f"no stage of {runs[0].folder} has a {METRIC}; make it by: "
                      f"{runs[0].command(SUP)}")
    sized, flat = {}, {}
    for run in runs:
        for stage in (WEAK, SUP):
            score = scores_of(run, stage).get(where)
            if score is not None:
                label = stage if len(runs) == 1 else f"{run.folder}/{stage}"
                sized[label] = run.parameters(stage), score
    if where in runs[0].baseline():
        flat["BM25"] = runs[0].baseline()[where]
    for label, scores in recorded(results).items():
        size = next((v for k, v in scores.items() if k.startswith("model/")
                     and k.endswith("/all/parameters")), None)
        if where in scores:
            (sized if size else flat)[label] = (size, scores[where]) if size else scores[where]
    return sized, flat, where


def scores_of(run, stage):
    """Return a stage's scores, {} where it has none."""
    try:
        return run.scores(stage)
    except Missing:
        return {}


# ---------------------------------------------------------------- the figures

def canvas(columns, width=4.2, height=3.2):
    """Return (an empty matplotlib figure, its `columns` plots in a row)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    plots = figure.subplots(1, columns, squeeze=False)[0]
    for plot in plots:
        plot.spines[["top", "right"]].set_visible(False)
    return figure, plots


def draw_loss(cfg, runs):
    """Draw each stage's loss; stage 4 a curve for each task, as they differ in scale."""
    curves = {stage: by_task(runs[0].log(stage), "loss") for stage in STAGES}
    figure, plots = canvas(len(STAGES), width=3.2, height=2.8)
    for plot, (stage, tasks) in zip(plots, curves.items()):
        for task, (steps, losses) in tasks.items():
            plot.plot(steps, losses, marker=".", markersize=3, linewidth=1, label=task)
        plot.set(title=stage, xlabel="step")
        if len(tasks) > 1:
            plot.set_yscale("log")
    plots[0].set(ylabel="loss")
    figure.legend(*plots[-1].get_legend_handles_labels(), loc="outside right upper",
                  frameon=False, fontsize="small")
    return figure


def draw_mask(cfg, runs):
    """Draw alpha and the rank of M over the weak stage, M of a text as long as the stage allows."""
    steps, alphas = next(iter(by_task(runs[0].log(WEAK), "alpha").values()))
    train = runs[0].config(WEAK)["train"]
    n = train["passage_len"]
    masks = [soft_mask(n, a, train["mask_axis"]) for a in alphas]
    figure, plots = canvas(2)
    plots[0].plot(steps, alphas, color="C1")
    plots[0].set(title=f"alpha, {train['schedule']}", xlabel="step", ylim=(0, 1.03))
    plots[1].plot(steps, [mask_rank(m) for m in masks], label="rank")
    plots[1].plot(steps, [effective_rank(m) for m in masks], "--", label="effective rank")
    plots[1].set(title=f"rank of M, {n} tokens, {train['mask_axis']}", xlabel="step", ylim=(0, n))
    plots[1].legend(frameon=False)
    return figure


def draw_dhnm(cfg, runs):
    """Draw what DHNM did: replacements of a step, queries without a pool left, S beside S_0."""
    rows = runs[0].log(SUP)
    if not by_task(rows, "replaced"):
        raise Missing(f"no step of {runs[0].folder / SUP / 'log.jsonl'} has hard negatives; train "
                      f"with retrieval, clr or classification rows: {runs[0].command(SUP)}")
    figure, plots = canvas(3, width=3.8)
    for plot, keys, title in zip(plots, (("replaced",), ("exhausted",), ("S", "S_0")), (
            "negatives replaced in the step", "queries whose pool has run out",
            "mean cosine: now (S), at first use (S_0, dashed)")):
        for key in keys:
            for i, (task, (steps, values)) in enumerate(by_task(rows, key).items()):
                plot.plot(steps, values, "--" if key == "S_0" else "-", color=f"C{i}", marker=".",
                          markersize=3, linewidth=1, label=task if key == keys[0] else None)
        plot.set(xlabel="step", ylim=(0, None))
        plot.set_title(title, fontsize="medium")
    plots[0].legend(frameon=False, fontsize="small")
    return figure


def draw_mrl(cfg, runs):
    """Draw the score of the first dims of an embedding against their number; BM25 dotted."""
    curves, bm25 = mrl_curves(runs[0].scores(SUP)), runs[0].baseline()
    if not curves:
        raise Missing(f"{runs[0].folder / SUP / 'eval.json'} has no scores of single dims; train "
                      f"with dims: {runs[0].command(SUP)} --dims=64,128,256,512")
    figure, (plot,) = canvas(1, width=5)
    for i, (name, curve) in enumerate(curves.items()):
        plot.plot(list(curve), list(curve.values()), marker="o", color=f"C{i}", label=name)
        lexical = bm25.get(f"retrieval/{name.replace(', ', '/')}/{METRIC}")
        if lexical is not None:
            plot.axhline(lexical, color=f"C{i}", linestyle=":", linewidth=1)
    ticks = sorted({dim for curve in curves.values() for dim in curve})
    plot.set_xscale("log", base=2)
    plot.set_xticks(ticks, labels=[str(dim) for dim in ticks])
    plot.minorticks_off()
    plot.set(xlabel="first dims of the embedding", ylabel="nDCG@10 (BM25 dotted)", ylim=(0, None))
    plot.legend(frameon=False, fontsize="small")
    return figure


def draw_figure1(cfg, runs):
    """Draw Figure 1: score against parameters; what has no parameters is a dotted line."""
    sized, flat, where = sizes_and_scores(runs, cfg.results)
    figure, (plot,) = canvas(1, width=5.6)
    for i, (label, (size, score)) in enumerate(sized.items()):
        plot.plot([size], [score], "os^Dv"[i % 5], color=f"C{i}",
                  label=f"{label}, {size / 1e6:.3g} M")
    for i, (label, score) in enumerate(flat.items(), len(sized)):
        plot.axhline(score, color=f"C{i}", linestyle=":", label=label)
    sizes = [size / 1e6 for size, _ in sized.values()]
    low, high = min(sizes) / 3.2, max(sizes) * 3.2
    ticks = [n * 10 ** k for k in range(-3, 6) for n in (1, 3) if low <= n * 10 ** k <= high]
    plot.set_xscale("log")
    plot.set_xticks([1e6 * tick for tick in ticks], labels=[f"{tick:g} M" for tick in ticks])
    plot.minorticks_off()
    highest = max([*flat.values(), *(score for _, score in sized.values())])
    plot.set(xlabel="parameters", ylabel=where.removeprefix("retrieval/"),
             xlim=(1e6 * low, 1e6 * high), ylim=(0, 1.05 * highest))
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def draw_figure3(cfg, runs):
    """Draw Figure 3: texts of many languages before CLR (stage 3) and after it (stage 4)."""
    docs = runs[0].config(SUP)["train"]["docs"]
    path = Path(cfg.texts or Path(docs) / "clr_test" / "queries.jsonl")
    if not path.is_file():
        raise Missing(f"{path} is missing: rows {{text, lang}}; name some by --texts=FILE, or make "
                      f"it by: {runs[0].command(SUP)}")
    rows = list(read_jsonl(path, {"text": str, "lang": str}))
    runs[0].config(WEAK)                           # Missing, before anything is embedded
    figure, plots = canvas(2, width=4.4, height=4.6)
    for plot, stage, title in zip(plots, (WEAK, SUP), ("before CLR", "after CLR")):
        encoder = Embedder(runs[0].folder / stage)
        scatter_languages(encoder, rows, plot)
        found = language_separation(encoder, rows)
        apart = found["centroid_distance"] / found["spread"]
        plot.set_title(f"{title} ({stage}): languages lie {apart:.2f} of their spread\napart, a "
                       f"probe names {found['language_accuracy']:.0%} of them", fontsize="medium")
        plot.set(xlabel="", ylabel="", xticks=[], yticks=[])
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center", ncols=13,
                  markerscale=3, fontsize="small", frameon=False, columnspacing=0.8,
                  handletextpad=0.1)
    return figure


FIGURES = {"loss": draw_loss, "mask": draw_mask, "dhnm": draw_dhnm, "mrl": draw_mrl,
           "figure1": draw_figure1, "figure3": draw_figure3}


def save_small(figure, path):
    """Write a PNG of 64 colours: a third of the bytes, and nothing to see of it."""
    from PIL import Image                          # comes with matplotlib

    whole = io.BytesIO()
    figure.savefig(whole, dpi=100)
    Image.open(whole).convert("RGB").quantize(64).save(path, optimize=True)


def figures(cfg):
    """Draw every figure whose data is there, say of the others what is missing.

    Returns the paths written. Raises ValueError without matplotlib.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("figures needs matplotlib: pip install matplotlib") from None
    runs, written = [Run(folder) for folder in cfg.out], []
    Path(cfg.figures).mkdir(parents=True, exist_ok=True)
    for name, draw in FIGURES.items():
        path = Path(cfg.figures) / f"{name}.png"
        try:
            figure = draw(cfg, runs)
        except Missing as missing:
            print(f"{path}: not drawn. {missing}")
            continue
        save_small(figure, path)
        size = path.stat().st_size
        print(f"{path}: {size / 1000:.0f} kB" + (", large for git" if size > LARGEST else ""))
        written.append(path)
    return written


# ---------------------------------------------------------------- command line

def trained(module, name):
    """Return the command `name` of a module of experiments/, read when it is asked for."""
    return lambda cfg: getattr(importlib.import_module(f"experiments.{module}"), name)(cfg)


COMMANDS = {"figures": figures,
            **{name: trained("scores", name) for name in (
                "table1", "table2", "table5", "table14", "table15", "appendix_b")},
            **{name: trained("languages", name) for name in (
                "table3", "table7", "table8", "table9", "table13")},
            **{name: trained("used", name) for name in ("table10", "table11")},
            **{name: trained("ablation", name) for name in ("table4", "table6", "table12")},
            **{name: trained("claims", name) for name in ("sec32", "sec34")}}


def main(argv=None):
    """Run the command that the first argument names."""
    argv = sys.argv[1:] if argv is None else list(argv)
    named = [arg for arg in argv if not arg.startswith("-")]
    cfg = load_config(TablesConfig, [arg for arg in argv if arg not in named])
    if len(named) != 1 or named[0] not in COMMANDS:
        raise ValueError(f"one of the commands {', '.join(COMMANDS)} is needed, not "
                         f"{' '.join(named) or 'none'}")
    if not COMMANDS[named[0]](cfg):
        raise ValueError("nothing was made")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"experiments.tables: error: {error}")
