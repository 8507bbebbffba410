"""The paper's Tables 4, 6 and 12: which cells each trains (experiments/lab.py), and its lines.

    python -m experiments.tables table4 --seeds=0,1,2,3,4        # table12 and table6 share stages
    python -m experiments.tables table4 --scale=real --root=FOLDER
"""
import dataclasses
import itertools

import numpy as np

import train
from experiments import paper
from experiments.lab import COLUMNS, ROWS, SUP, WEAK, Cell, Lab, cell, seconds
from experiments.layout import markdown, write_files
from experiments.stats import interval, paired, shown
from train import TrainConfig

TABLE_4 = {key: cell(*key) for key in itertools.product((False, True), repeat=3)}
TABLE_6 = {(rank, sm): cell(sm, True, True, lora_rank=rank)
           for rank in (16, 32, 64, 0) for sm in (False, True)}
TABLE_12 = {"Linear": Cell(), "Accelerating": Cell("accelerating"),
            "Decelerating": Cell("decelerating"), "hard switch": Cell("hard"),
            "linear, columns": Cell(mask_axis="col"),
            "linear, logits x M": Cell(mask_apply="logits")}
LONGER = {"linear, 3 x steps": Cell(times=3), "hard switch, 3 x steps": Cell("hard", times=3)}


def record(lab, name, cells, tried, seeds):
    """Return all that a table rests on, for its JSON file: {"cells": {label: ..}, ...}."""
    found = {}
    for label, one in cells.items():
        found[label] = {
            "settings": dataclasses.asdict(one),
            "scores": {seed: lab.read(seed, one) for seed in seeds},
            "after_stage_3": {seed: lab.read(seed, one, WEAK) for seed in seeds},
            "seconds": {seed: [round(sum(seconds(lab.log(seed, one, stage))), 1)
                               for stage in (WEAK, SUP)] for seed in seeds}}
    default = dataclasses.asdict(TrainConfig())
    places = {"out", "docs", "previous", "evaluate", "text", "pairs", "retrieval", "clr",
              "classification", "sts"}
    settings = {stage: {k: v for k, v in dataclasses.asdict(cfg).items()
                        if v != default[k] and k not in places} for stage, cfg in lab.base.items()}
    return {"table": name, "scale": lab.scale, "seeds": list(seeds), "settings": settings,
            "rows": ROWS if lab.scale == "toy" else None, "cells": found,
            "learning_rates": lab.rates, "learning_rates_tried": tried,
            "versions": train.versions()}


def by_seed(entry, column, after=SUP):
    """Return {seed: score} of a recorded cell."""
    scores = entry["scores" if after == SUP else "after_stage_3"]
    return {seed: row[column] for seed, row in scores.items()}


def grid(header, rows):
    """Return a Markdown table as lines."""
    return [*markdown([dict(zip(header, row)) for row in rows]).split("\n"), ""]


def cells_of(entry, base=None, after=SUP):
    """Return a row's three columns, or their differences to `base`, paired by seed."""
    if base is None:
        return [shown(interval(by_seed(entry, c, after).values())) for c in COLUMNS]
    return [shown(paired(by_seed(entry, c, after), by_seed(base, c, after)), True)
            for c in COLUMNS]


def printed(values):
    """Write the paper's numbers, or dashes where it has none."""
    return [f"{v:.2f}" for v in values] if values else ["-"] * len(COLUMNS)


def preface(found, title):
    """Return the lines above a table: what was trained, on what, at which rates."""
    rates, rows = found["learning_rates"], []
    for stage, tried in found["learning_rates_tried"].items():
        for label, scores in tried.items():
            best = max(scores, key=scores.get)
            rows.append([stage, label, ", ".join(
                f"**{float(rate):g}: {score:.1f}**" if rate == best else f"{float(rate):g}: "
                f"{score:.1f}" for rate, score in scores.items()), f"{rates[stage]:g}"])
    return [f"# {title}", "",
            "nDCG@10 in percent on the test questions, mean and 95 % interval over the seeds "
            f"{', '.join(map(str, found['seeds']))} (Student's t); differences are paired by seed "
            "and bold where they exceed their interval. Multi: mean of the other languages -> "
            "English; Eng: English; Zh: Chinese -> English. The paper's numbers are MTEB's: their "
            "order and differences can be compared, their size cannot.", "",
            "Learning rates, tried on other questions and another seed (mean of Multi and Eng), "
            "and the one that all cells have: the best by the mean of the two; LoRA's multiply it.",
            "", *grid(["stage", "cell", "rate: score", "taken"], rows)]


def table4_lines(found):
    """Return Table 4 in Markdown: cells, differences to the empty one, mean effect of each part."""
    cells, marks = found["cells"], {key: ["✓" if on else "✗" for on in key] for key in TABLE_4}
    base, order = cells[name_4((0, 0, 0))], sorted(TABLE_4, key=sum)
    lines = preface(found, "Table 4: soft mask x CLR x DHNM")
    lines += ["Without SM the mask is bidirectional from the first step of stage 3 on; without CLR "
              "its steps go to retrieval; without DHNM the first negatives stay.", ""]
    lines += grid(["SM", "CLR", "DHNM", *COLUMNS, *(f"paper {c}" for c in COLUMNS)], [
        [*marks[key], *cells_of(cells[name_4(key)]), *printed(paper.TABLE_4.get(key))]
        for key in order])
    lines += ["Against the cell with nothing on:", ""]
    lines += grid(["SM", "CLR", "DHNM", *COLUMNS], [
        [*marks[key], *cells_of(cells[name_4(key)], base)] for key in order[1:]])
    lines += ["The effect of a part: with it minus without it, mean over the four settings of the "
              "other two:", ""]
    return lines + grid(["part", *COLUMNS], [
        [part, *(shown(effect(cells, at, c), True) for c in COLUMNS)]
        for at, part in enumerate(("SM", "CLR", "DHNM"))])


def name_4(key):
    """Name a cell of Table 4: "SM+CLR", "nothing"."""
    return "+".join(part for part, on in zip(("SM", "CLR", "DHNM"), key) if on) or "nothing"


def effect(cells, at, column):
    """Return the interval of the mean difference that part number `at` makes, by seed."""
    off = [key for key in TABLE_4 if not key[at]]
    on = [tuple(i == at or v for i, v in enumerate(key)) for key in off]
    mean = [{seed: np.mean([cells[name_4(key)]["scores"][seed][column] for key in side])
             for seed in cells["nothing"]["scores"]} for side in (on, off)]
    return paired(*mean)


def name_6(key):
    """Name a cell of Table 6: "LoRA r = 16, soft mask", "full, hard switch"."""
    rank, sm = key
    return f"{f'LoRA r = {rank}' if rank else 'full'}, {'soft mask' if sm else 'hard switch'}"


def table6_lines(found):
    """Return Table 6 in Markdown: English as the paper has it, then the other columns."""
    cells = found["cells"]
    lines = preface(found, "Table 6: LoRA and full fine-tuning, without and with the soft mask")
    lines += ["LoRA trains stages 3 and 4 by adapters; CLR and DHNM are on in every cell. (The "
              "paper's full row repeats Table 4: 71.50 is DHNM alone, 73.52 all three parts.)", ""]
    ranks = list(dict.fromkeys(rank for rank, _ in TABLE_6))
    for column in ("Eng", "Multi", "Zh"):
        rows = []
        for rank in ranks:
            hard, soft = (by_seed(cells[name_6((rank, sm))], column) for sm in (False, True))
            theirs = [f"{paper.TABLE_6[rank, sm]:.2f}" if column == "Eng" else "-" for sm in (0, 1)]
            rows.append([f"LoRA r = {rank}" if rank else "full", shown(interval(hard.values())),
                         shown(interval(soft.values())), shown(paired(soft, hard), True), *theirs])
        lines += grid([column, "without SM", "with SM", "difference", "paper without",
                       "paper with"], rows)
    lines += ["LoRA against full fine-tuning:", ""]
    return lines + grid(["", *COLUMNS], [
        [name_6(key), *cells_of(cells[name_6(key)], cells[name_6((0, key[1]))])]
        for key in TABLE_6 if key[0]])


def table12_lines(found):
    """Return Table 12 in Markdown: after stage 4, after stage 3, and differences to linear."""
    cells = found["cells"]
    lines = preface(found, "Table 12: schedules and readings of the soft mask")
    lines += ["The soft mask alone, without CLR and DHNM, as in the paper's App. C; the lower "
              "three are this project's: the hard switch, Eq. (4) by columns, and the reading "
              "softmax(logits x M).", ""]
    for after, title in ((SUP, "After stage 4"), (WEAK, "After stage 3")):
        lines += [f"{title}:", ""] + grid(
            ["function", *COLUMNS, *(f"paper {c}" for c in COLUMNS)],
            [[label, *cells_of(cells[label], after=after),
              *printed(paper.TABLE_12.get(label) if after == SUP else None)] for label in TABLE_12])
        lines += [f"{title}, against linear:", ""] + grid(["function", *COLUMNS], [
            [label, *cells_of(cells[label], cells["Linear"], after)]
            for label in TABLE_12 if label != "Linear"])
    lines += ["Does the soft mask only need more time? Stage 3 three times as long:", ""]
    soft, hard = LONGER
    for after, title in ((WEAK, "after stage 3"), (SUP, "after stage 4")):
        lines += grid([title, *COLUMNS], [
            *([label, *cells_of(cells[label], after=after)] for label in LONGER),
            ["hard minus linear", *cells_of(cells[hard], cells[soft], after)]])
    return lines


def make_table(cfg, name, cells, lines_of):
    """Train the cells of a table and write results/NAME.json and .md; return the paths."""
    lab, paths = Lab(cfg), []
    print(f"{name}: learning rates, in {lab.work}", flush=True)
    tried = lab.tune(cells.values())

    def finish(seeds):
        found = record(lab, name, cells, tried, seeds)
        paths[:] = write_files(cfg, name, found, "\n".join(lines_of(found)))

    lab.train(name, cfg.seeds, list(cells.values()), finish)
    return paths


def table4(cfg):
    """Train and write Table 4."""
    return make_table(cfg, "table4", {name_4(k): one for k, one in TABLE_4.items()}, table4_lines)


def table6(cfg):
    """Train and write Table 6."""
    return make_table(cfg, "table6", {name_6(k): one for k, one in TABLE_6.items()}, table6_lines)


def table12(cfg):
    """Train and write Table 12."""
    return make_table(cfg, "table12", TABLE_12 | LONGER, table12_lines)
