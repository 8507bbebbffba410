"""The figures, from what runs have left behind; nothing is trained here.

    python -m experiments.figures                          # the run in out/ -> results/figures
    python -m experiments.figures --only=soft_mask         # PAPER Sec. 3.2: M, and its rank
    python -m experiments.figures --out=out,out/w64        # more sizes, or seeds: for Figure 1
    python -m experiments.figures --only=figure3 --before=CELL/embed_sup --after=CELL/embed_sup

soft_mask, loss (all stages), dhnm (Sec. 3.4), mrl, figure1 (score against size), figure3 (languages
before and after CLR), curve (soft minus hard against LM tokens); each a PNG. A figure whose data
does not exist says which file is missing. Needs matplotlib and scikit-learn.
UNSPECIFIED: Figure 3 shows principal components, as the paper names no projection.
"""
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import load_config, run_command
from embed import Embedder
from engine.jsonl import read_jsonl, read_object
from eval import classification
from experiments.results import interval, mean_of, paired
from experiments.runs import ndcg_by_dims, read_log, read_scores, score_of, write_result
from mask import KINDS, alpha, mask_rank, soft_mask
from train import STAGES

WEAK, SUP = STAGES[2:]
TEST = ("retrieval/", "/test/ndcg@10")             # start and end of a score's key
LANGUAGES = ("en", "zh", "ja", "de", "fr", "es")   # the six of the paper's Figure 3


@dataclass(frozen=True)
class FiguresConfig:
    """The settings of `python -m experiments.figures`."""
    out: tuple[str, ...] = ("out",)    # folders of train.py; all but Figure 1 show the first
    figures: str = "results/figures"   # folder of the pictures
    results: str = "results"           # folder of baselines.json and curve.json
    only: tuple[str, ...] = ()         # names of figures; empty: all
    before: str = ""                   # Figure 3: a stage's folder; empty: OUT/embed_weak
    after: str = ""                    # Figure 3: empty: OUT/embed_sup
    texts: str = "out/installed_docs/clr_test/queries.jsonl"   # Figure 3: rows {text, lang}


def canvas(columns, width=4.2, height=3.2, **more):
    """Return (an empty matplotlib figure, its `columns` plots in a row)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height), layout="constrained")
    plots = figure.subplots(1, columns, squeeze=False, **more)[0]
    for plot in plots:
        plot.spines[["top", "right"]].set_visible(False)
    return figure, plots


def by_task(rows, key):
    """Return {task: ([step ..], [value ..])} of the rows of a log that have `key`."""
    curves = {}
    for row in rows:
        if row.get(key) is not None:
            steps, values = curves.setdefault(row["task"], ([], []))
            steps.append(row["step"])
            values.append(row[key])
    return curves


def draw_soft_mask(cfg, n=64):
    """Draw the mask at five alphas, and rank against step for the three schedules."""
    figure, plots = canvas(6, width=2.5, height=2.9, width_ratios=[1] * 5 + [1.5])
    for plot, a in zip(plots, (0.0, 0.1, 0.25, 0.5, 1.0)):
        m = soft_mask(n, a)
        plot.imshow(m.numpy(), vmin=0, vmax=1, cmap="viridis")
        plot.set(xticks=[], yticks=[], title=f"alpha {a:g}, rank {mask_rank(m)}")
    plots[0].set(xlabel="key token j", ylabel="query token i")
    for kind, style in zip(KINDS, ("-", "--", ":")):
        ranks = [mask_rank(soft_mask(n, alpha(t, n, kind))) for t in range(n + 1)]
        plots[-1].plot(range(n + 1), ranks, style, label=kind)
    plots[-1].set(xlabel="step", ylabel=f"rank of M (N = {n})")
    plots[-1].legend(frameon=False)
    return figure


def held_out(rows, scores):
    """Return [(step, loss on held-out text)] of an LM stage: at its start, now and then, its end.

    A row of the log has the newest value, which stands there until the next one.
    """
    if not rows[0].get("validation"):
        return []
    points = [(0, rows[0]["validation_before"])]
    for row in rows:
        if row["validation"] != points[-1][1]:
            points.append((row["step"], row["validation"]))
    return [*points, (rows[-1]["step"], score_of(scores, "lm/", "/loss"))]


def draw_loss(cfg):
    """Draw each stage's loss; stage 4 a curve for each task, as they differ in scale.

    Stages 1 and 2 have the loss on held-out text, too: before the first step, and now and then.
    """
    from matplotlib.ticker import LogLocator

    figure, plots = canvas(len(STAGES), width=3.2, height=2.8)
    for plot, stage in zip(plots, STAGES):
        rows, scores = (read(Path(cfg.out[0]) / stage) for read in (read_log, read_scores))
        for task, curve in by_task(rows, "loss").items():
            plot.plot(*curve, marker=".", markersize=3, linewidth=1, label=task)
        if measured := held_out(rows, scores):
            plot.plot(*zip(*measured), "k.--", linewidth=1, label="held-out")
            plot.legend(frameon=False, fontsize="small")
        plot.set(title=stage, xlabel="step")
    plots[-1].set_yscale("log")
    plots[-1].yaxis.set_major_locator(LogLocator(subs=(1, 3)))
    plots[-1].yaxis.set_major_formatter("{x:g}")
    plots[-1].minorticks_off()
    plots[-1].set_ylim(top=6 * plots[-1].get_ylim()[1])      # room for the legend
    plots[0].set(ylabel="loss")
    plots[-1].legend(frameon=False, fontsize="small")
    return figure


def draw_dhnm(cfg):
    """Draw what DHNM did: replacements in a step, queries without a pool left, S beside S_0."""
    rows = read_log(Path(cfg.out[0]) / SUP)
    if not by_task(rows, "replaced"):
        raise FileNotFoundError(f"no step of {cfg.out[0]}/{SUP}/log.jsonl has hard negatives")
    figure, plots = canvas(3, width=3.8)
    for key, plot, style in (("replaced", plots[0], "-"), ("exhausted", plots[1], "-"),
                             ("S", plots[2], "-"), ("S_0", plots[2], "--")):
        for i, (task, curve) in enumerate(by_task(rows, key).items()):
            plot.plot(*curve, style, color=f"C{i}", linewidth=1, label=task)
        plot.set(xlabel="step", ylim=(0, None))
    for plot, title in zip(plots, ("negatives replaced in the step",
                                   "queries whose pool is exhausted",
                                   "mean cosine: now (S), at first use (S_0, dashed)")):
        plot.set_title(title, fontsize="medium")
    plots[0].legend(frameon=False, fontsize="small")
    return figure


def draw_mrl(cfg):
    """Draw nDCG@10 of the first dims of an embedding against their number."""
    curve = ndcg_by_dims(read_scores(Path(cfg.out[0]) / SUP))
    if not curve:
        raise FileNotFoundError(f"{cfg.out[0]}/{SUP}/eval.json has no scores of single dims")
    figure, (plot,) = canvas(1, width=5)
    plot.plot(*zip(*curve.items()), marker="o", clip_on=False)
    plot.set_xscale("log", base=2)
    plot.set_xticks(list(curve), labels=map(str, curve))
    plot.set(xlabel="first dims of the embedding", ylabel="nDCG@10", ylim=(0, None))
    return figure


def draw_figure1(cfg):
    """Draw Figure 1: score against parameters, with a trendline once there are three sizes.

    Runs of equal size are its seeds. RESULTS/figure1.json gets the points.
    DEVIATES: the trendline is that of our own sizes. Baselines have none, and are dotted lines.
    """
    runs = defaultdict(dict)                       # {parameters: {seed: scores}}
    for out in map(Path, cfg.out):
        seeds = runs[Embedder(out / SUP).model.count_params()]
        seeds[str(len(seeds))] = {
            f"nDCG@10 after {stage}": score_of(read_scores(out / stage), *TEST)
            for stage in (WEAK, SUP)}
    sizes = sorted(runs)
    write_result(cfg.results, "figure1", {
        "title": "Figure 1: score against parameters",
        "command": f"python -m experiments.figures --only=figure1 --out={','.join(cfg.out)}",
        "seeds": list(range(max(map(len, runs.values())))),
        "cells": {f"{size:,} parameters": runs[size] for size in sizes},
        "notes": ["All sizes take the same steps, at the rates of the default run."]})
    figure, (plot,) = canvas(1, width=5.6)
    for stage, marker in zip((WEAK, SUP), "os"):
        means, halves = zip(*(interval(row[f"nDCG@10 after {stage}"] for row in runs[size].values())
                              for size in sizes))
        points = plot.errorbar(sizes, means, halves, fmt=marker, capsize=3, label=stage)
        if len(sizes) > 2:                         # the paper's trendline, in log(parameters)
            x = np.log10(sizes)
            plot.plot(sizes, np.polyval(np.polyfit(x, means, 1), x), "--",
                      color=points.lines[0].get_color())
    baselines = read_object(Path(cfg.results) / "baselines.json")
    for i, (label, scores) in enumerate(baselines["scores"].items(), 2):
        plot.axhline(score_of(scores, *TEST), color=f"C{i}", linestyle=":", label=label)
    plot.set_xscale("log")
    plot.minorticks_off()
    plot.set_xticks(sizes, labels=[f"{size / 1e6:.2g}M" for size in sizes])
    plot.set(xlabel="parameters", ylabel="nDCG@10, test", ylim=(0, None))
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    return figure


def components(vectors):
    """Return (N, 2) coordinates of vectors (N, D) along their first two principal components."""
    centred = vectors - vectors.mean(0)
    return centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T


def draw_figure3(cfg):
    """Draw Figure 3: texts of six languages before stage 4, which has CLR, and after it."""
    rows = [row for row in read_jsonl(cfg.texts, {"text": str, "lang": str})
            if row["lang"] in LANGUAGES]
    figure, plots = canvas(2, width=4.4, height=4.6)
    titles = ("without CLR", "with CLR") if cfg.before else ("after stage 3", "after stage 4")
    for plot, title, folder in zip(plots, titles, (
            cfg.before or Path(cfg.out[0]) / WEAK, cfg.after or Path(cfg.out[0]) / SUP)):
        encoder = Embedder(folder)
        points = components(encoder.encode([row["text"] for row in rows]))
        for i, lang in enumerate(LANGUAGES):
            own = [row["lang"] == lang for row in rows]
            plot.scatter(*points[own].T, s=4, alpha=0.5, color=f"C{i}", label=lang)
        labelled = [{"text": row["text"], "label": lang, "split": ("train", "test")[i % 2]}
                    for lang in LANGUAGES
                    for i, row in enumerate(row for row in rows if row["lang"] == lang)]
        probe = classification(encoder, labelled)["accuracy"]
        plot.set_title(f"{title}: a linear probe names\n{probe:.0%} of the languages",
                       fontsize="medium")
        plot.set(xticks=[], yticks=[])
    figure.legend(*plots[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(LANGUAGES), markerscale=3, frameon=False)
    return figure


def draw_curve(cfg):
    """Draw soft minus hard, and both scores, against LM tokens seen before stage 3."""
    table = read_object(Path(cfg.results) / "curve.json")
    tokens = list(table["points"].values())
    figure, plots = canvas(2)
    values = {mask: [mean_of(table, [f"{name} {mask}"], "Eng") for name in table["points"]]
              for mask in ("hard", "soft")}
    for mask, points in values.items():
        means, halves = zip(*(interval(point.values()) for point in points))
        plots[0].errorbar(tokens, means, halves, marker="o", capsize=3, label=mask)
    means, halves = zip(*(paired(*pair) for pair in zip(values["soft"], values["hard"])))
    plots[1].errorbar(tokens, means, halves, marker="o", capsize=3, color="C2")
    plots[1].axhline(0, color="grey", linewidth=0.8)
    plots[0].legend(frameon=False)
    for plot, title in zip(plots, ("nDCG@10 after stage 3, percent", "soft minus hard")):
        plot.set_xscale("symlog", linthresh=2e5)
        plot.set(xlabel="LM tokens before stage 3", title=title, xlim=(-3e4, 2 * tokens[-1]))
    return figure


FIGURES = {"soft_mask": draw_soft_mask, "loss": draw_loss, "dhnm": draw_dhnm, "mrl": draw_mrl,
           "figure1": draw_figure1, "figure3": draw_figure3, "curve": draw_curve}


def main(argv=None):
    """Draw every figure whose data exists; return the paths."""
    cfg = load_config(FiguresConfig, argv)
    unknown = set(cfg.only) - FIGURES.keys()
    if unknown:
        raise ValueError(f"no such figure: {', '.join(sorted(unknown))}; there are "
                         f"{', '.join(FIGURES)}")
    written = []
    for name in cfg.only or FIGURES:
        path = Path(cfg.figures) / f"{name}.png"
        try:
            figure = FIGURES[name](cfg)
        except FileNotFoundError as missing:
            print(f"{path}: not drawn. {missing}")
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
        print(path)
        written.append(path)
    return written


if __name__ == "__main__":
    run_command(main)
