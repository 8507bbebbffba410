"""The paper's three ideas, switched off one at a time: Tables 4, 6, 12, Sec. 3.2 to 3.4, a curve.

    python -m experiments.ablation table12 --seeds=0,1,2,3,4 --pawsx=FILE --sts=FILE
    python -m experiments.ablation tune                      # learning rates, before two lanes
    python -m experiments.ablation table12 --seeds=0,2,4     # one lane of two: an LM seed each
    python -m experiments.ablation table12 --seeds=1,3       # the other
    python -m experiments.ablation table12 --cells=linear,hard       # some rows of it
    python -m experiments.ablation table4 --seeds=0 --lm_steps=20 --weak_steps=10 --sup_steps=10 \\
        --tune=false --work=out/try --results=out/try        # a few steps of all, for a look

All cells of a language-model seed start from one stage-2 checkpoint. Learning rates are tuned once,
on dev, for the cell with nothing on and the cell with all on, and kept in WORK/rates.json. Test is
read by the tables alone. `curve` times its steps: its second lane starts after the first seed.
Every command is resumable, adds each seed to results/NAME.json, and prints its table.
Beside nDCG@10 stand measures that can see a mask (experiments/probes.py).

A data folder needs dev/, test/, clr_dev/ and clr_test/.
DEVIATES: stage 3 of the tables has no cross-lingual pairs: stage 4 alone has them. See `clr`.
"""
import dataclasses
import shlex
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from configurator import load_config, run_command
from embed import Embedder
from engine import checkpoint
from engine.collection import document_text, load_collection
from engine.jsonl import read_object
from engine.run import versions
from eval import CachedEncoder, retrieval
from experiments import probes
from experiments.cells import (NOTHING, PRETRAIN, ROWS, SFT, SUP, TWO, WEAK, Cell, Lab, columns,
                               table4_cell)
from experiments.results import cells_lines
from experiments.runs import choose, mean, read_log, read_scores, seconds, write_result
from train import TrainConfig, stage_mask

TABLE_4 = {                            # {row: which of SM, CLR and DHNM are on}
    "nothing": (0, 0, 0), "DHNM": (0, 0, 1), "CLR": (0, 1, 0), "SM": (1, 0, 0),
    "CLR+DHNM": (0, 1, 1), "SM+DHNM": (1, 0, 1), "SM+CLR": (1, 1, 0), "SM+CLR+DHNM": (1, 1, 1)}
TABLE_12 = {"linear": Cell(), "accelerating": Cell("accelerating"),
            "decelerating": Cell("decelerating"), "hard": Cell("hard"),
            "causal": Cell("causal"), "linear columns": Cell(mask_axis="col"),
            "linear logits x M": Cell(mask_apply="logits"),
            "linear last token": Cell(pooling="last"),
            "causal last token": Cell("causal", pooling="last")}
AGAINST = {                            # of Table 12: {row: the rows that it is compared with}
    "linear": ["hard"], "accelerating": ["hard", "linear"], "decelerating": ["hard", "linear"],
    "causal": ["hard"], "linear columns": ["hard", "linear"],
    "linear logits x M": ["hard", "linear"],
    "linear last token": ["linear"], "causal last token": ["linear last token"],
    "linear twice the steps": ["hard twice the steps"]}
# What the paper printed, in percent; nothing is corrected. Table 12 repeats a row of Table 4.
PAPER_4 = {(1, 0, 0): (61.73, 70.41, 70.99), (0, 1, 0): (62.69, 70.94, 71.41),
           (0, 0, 1): (61.81, 71.50, 72.09), (1, 1, 0): (64.45, 72.14, 71.79),
           (1, 0, 1): (63.03, 72.78, 72.44), (1, 1, 1): (65.17, 73.52, 74.24)}
PAPER_6 = {(16, 0): 72.18, (16, 1): 72.12, (32, 0): 72.08, (32, 1): 72.23, (64, 0): 71.83,
           (64, 1): 72.40, (0, 0): 71.50, (0, 1): 73.52}
PAPER_12 = {"linear": (61.73, 70.41, 70.99), "accelerating": (61.50, 70.51, 70.81),
            "decelerating": (61.43, 70.01, 70.37)}
RANKS = (16, 32, 64, 0)            # of Table 6's adapters; 0: all weights
RECIPE = ("config", "data", "lm_seeds")    # settings that all rows of a table share
STAGE_4 = f"Stage 4 is retrieval and CLR alone: {ROWS} questions, no STS, classes or MRL."
PARTS = 6                          # of stage 4, which Sec. 3.4 looks at one by one
EQUAL_TIME = 3e6                   # LM tokens, and more, whose time a stage 3 without LM gets too


@dataclass(frozen=True)
class AblationConfig:
    """The settings of `python -m experiments.ablation COMMAND`."""
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    lm_seeds: int = 2              # language models; seed s takes number s % lm_seeds
    cells: tuple[str, ...] = ()    # rows of the table by their labels; empty: all
    config: str = "config/small"   # the recipe: a folder with a config file for each stage
    data: str = "out/installed_docs"       # in the layout of train.py's `data`
    work: str = "out/ablation"     # where the cells are trained
    results: str = "results"       # where NAME.json goes
    lm_steps: int = 0              # of stage 1; 0: the config's
    weak_steps: int = 300          # of stage 3; 0: the config's
    sup_steps: int = 150           # of stage 4; 0: the config's
    lm_tokens: tuple[float, ...] = (0, 0.3e6, 1e6, 3e6)    # of the curve, and the config's own
    tune: bool = True              # choose learning rates on dev; false: the config's
    pawsx: str = ""                # file of PAWS-X rows: sentence1, sentence2, label, lang
    sts: str = ""                  # file of STS rows: sentence1, sentence2, score


def make_table(lab, name, cells, *, stage=WEAK, measure=None, **more):
    """Train `cells` {label: Cell}, seed after seed; write RESULTS/NAME.json and print it.

    Rows and seeds that the file has already stay in it, if their settings are the same.
    measure(folder) -> {column: number}; None: `Lab.measure`. more: title, differences {name:
    (labels, labels)}, paper {label: {column: number}}, notes, transpose (results.py).
    """
    if unknown := set(lab.cfg.cells) - cells.keys():
        raise ValueError(f"{name} has no row {min(unknown)!r}; its rows are {', '.join(cells)}")
    table = {**more, "seeds": [], "cells": {}, "language_models": {},
             "settings": {label: dataclasses.asdict(cell) for label, cell in cells.items()},
             "steps": {s: cfg.steps for s, cfg in lab.base.items()},
             "recipe": {key: getattr(lab.cfg, key) for key in RECIPE},
             "learning_rates": lab.tuned, "versions": [versions()]}
    path = Path(lab.cfg.results) / f"{name}.json"
    stages = (WEAK, SUP) if stage == SUP else (WEAK,)  # whose learning rates count
    add_earlier(table, path, stages)                   # a mistake would show at the very end
    for seed in lab.cfg.seeds:
        for label in lab.cfg.cells or cells:
            cell, folder = cells[label], lab.train(seed, stage, cells[label])
            table["cells"].setdefault(label, {})[str(seed)] = (measure or lab.measure)(folder)
            if cell.lm_steps != 0:
                lm = lab.lm_folder(seed, cell)
                if lm.name not in table["language_models"]:
                    table["language_models"][lm.name] = language_model(lab, lm)
        add_earlier(table, path, stages)               # again: another lane may have written
        write_result(lab.cfg.results, name, table | {
            "command": command_of(lab.cfg, table, name),
            "differences": {key: sides for key, sides in more.get("differences", {}).items()
                            if all(sides) and {*sides[0], *sides[1]} <= table["cells"].keys()}})
    print("\n".join(cells_lines(read_object(path))))
    return path


def command_of(cfg, table, name):
    """Return the command of a table: whatever is not the default, but this machine's folders."""
    flags = {"seeds": tuple(table["seeds"])}
    if table["cells"].keys() != table["settings"].keys():
        flags["cells"] = tuple(table["cells"])
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        if value != field.default and field.name not in ("seeds", "cells", "work", "results"):
            flags[field.name] = "FILE" if field.name in ("pawsx", "sts") else value
    return f"python -m experiments.ablation {name} " + shlex.join(
        f"--{key}={','.join(map(str, value)) if isinstance(value, tuple) else value}"
        for key, value in flags.items())


def add_earlier(table, path, stages):
    """Add to a table what its file has of other seeds and rows; other settings are an error."""
    before, cells = {"cells": {}, "language_models": {}, "versions": []}, table["cells"]
    if path.is_file():
        before = read_object(path)
        rates = [[file["learning_rates"]["rates"].get(s) for s in stages]
                 for file in (before, table)]
        if before["steps"] != table["steps"] or rates[0] != rates[1]:
            raise ValueError(f"{path} has other steps or learning rates; choose another --results")
        own = before.get("recipe") or {key: getattr(AblationConfig, key) for key in RECIPE}
        if own != table["recipe"]:                     # files of before it was noted: the default
            raise ValueError(f"{path} is of {own}, not {table['recipe']}; choose another --results")
    for label, rows in before["cells"].items():
        own = dataclasses.asdict(Cell()) | before["settings"][label]   # a field may be new
        if own != table["settings"].get(label):
            raise ValueError(f"{path}: {label} had other settings; choose another --results")
        cells[label] = rows | cells.get(label, {})
    table["cells"] = {label: dict(sorted(cells[label].items(), key=lambda item: int(item[0])))
                      for label in table["settings"] if label in cells}
    table["seeds"] = sorted({int(seed) for rows in cells.values() for seed in rows})
    table["language_models"] = before["language_models"] | table["language_models"]
    table["versions"] = [v for v in before["versions"] if v not in table["versions"]] + \
        table["versions"]


def language_model(lab, folder):
    """Return the loss of a language model on dev documents, and how many tokens it has read."""
    texts = [row["text"] for row in load_collection(f"{lab.cfg.data}/dev").corpus]
    return {"loss": probes.lm_loss(Embedder(folder / PRETRAIN), texts),
            "tokens": read_log(folder / PRETRAIN)[-1]["tokens"]}


# ---------------------------------------------------------------- Tables 4, 6 and 12

def table4(lab):
    """Write Table 4: soft mask x CLR x DHNM, and the mean effect of each part."""
    def rows(**on):
        return [label for label, key in TABLE_4.items()
                if on.items() <= dict(zip(("SM", "CLR", "DHNM"), key)).items()]

    effects = {f"{part}: with minus without": (rows(**{part: 1}), rows(**{part: 0}))
               for part in ("SM", "CLR", "DHNM")}
    effects |= {f"{part}, {'with' if on else 'without'} {other}": (
        rows(**{part: 1, other: on}), rows(**{part: 0, other: on}))
        for part, other in (("CLR", "SM"), ("DHNM", "CLR")) for on in (1, 0)}
    return make_table(
        lab, "table4", {label: table4_cell(*key) for label, key in TABLE_4.items()}, stage=SUP,
        measure=lambda folder: columns(read_scores(folder)),       # as the paper's
        title="Table 4: soft mask x CLR x DHNM", differences=effects,
        paper={label: dict(zip(("Multi", "Eng", "Zh"), PAPER_4[key]))
               for label, key in TABLE_4.items() if key in PAPER_4},
        notes=[STAGE_4, "Without SM the mask is bidirectional from the first step of stage 3.",
               "Without CLR its steps are retrieval's. Without DHNM the first negatives stay."])


def table6(lab):
    """Write Table 6: LoRA of three ranks and full fine-tuning, without and with the soft mask."""
    def label(rank, sm):
        return f"{f'LoRA r = {rank}' if rank else 'full'} {'soft' if sm else 'hard'}"

    cells = {label(rank, sm): table4_cell(sm, 1, 1, lora_rank=rank)
             for rank in RANKS for sm in (0, 1)}
    return make_table(
        lab, "table6", cells, stage=SUP,
        title="Table 6: LoRA and full fine-tuning, without and with the soft mask",
        differences={f"{label(rank, 1)} minus hard": ([label(rank, 1)], [label(rank, 0)])
                     for rank in RANKS},
        paper={label(*key): {"Eng": value} for key, value in PAPER_6.items()},
        notes=[STAGE_4,
               "CLR and DHNM are on in every cell. LoRA trains stages 3 and 4 by adapters.",
               "The paper's full row repeats Table 4: 71.50 is DHNM alone, 73.52 all parts."])


def table12(lab):
    """Write Table 12, after stage 3: schedules, readings of the mask, causal, a longer stage."""
    longer = {f"{schedule} twice the steps": Cell(schedule, weak_steps=2 * lab.base[WEAK].steps)
              for schedule in ("linear", "hard")}
    return make_table(
        lab, "table12", TABLE_12 | longer,
        title="Table 12: schedules and readings of the soft mask, after stage 3",
        differences={f"{label} minus {other}": ([label], [other])
                     for label, others in AGAINST.items() for other in others},
        paper={label: dict(zip(("Multi", "Eng", "Zh"), values))
               for label, values in PAPER_12.items()},
        notes=["\"hard\" is bidirectional from the first step. \"causal\" never opens.",
               "The rate was tuned for the hard switch and the linear mask; other rows take it.",
               "\"columns\" is Eq. (4) by the prose. \"logits x M\" multiplies the logits."])


# ---------------------------------------------------------------- Sec. 3.2: the switch

def after_switch(log):
    """Return how a stage 3 starts and ends, and whether it stands still.

    "Longest stand": the most steps without a new minimum of the loss, smoothed over a twentieth of
    the stage.
    """
    width = max(1, len(log) // 20)
    loss = [row["loss"] for row in log]
    smooth = [np.mean(loss[max(0, i + 1 - width):i + 1]) for i in range(len(loss))]
    lows = np.minimum.accumulate(smooth)
    new = [0, *(i for i in range(1, len(smooth)) if lows[i] < lows[i - 1]), len(smooth)]
    return {"Loss, first step": loss[0], **{
        f"{label}, {place} tenth": mean(log, key, *part)
        for label, key in (("Loss", "loss"), ("Gradient norm", "grad_norm"))
        for place, part in (("first", (0, 0.1)), ("last", (0.9, 1)))},
            "Longest stand, steps": int(max(np.diff(new)))}


def switch_measures(texts, folder):
    """Return what Sec. 3.2 speaks of: loss, gradient, the LM's loss, and ranks along stage 3."""
    cfg = load_config(TrainConfig, [f"{folder}.py"])       # as `Lab.train` wrote it
    lm = Path(cfg.previous).with_suffix("")
    measures = after_switch(read_log(folder))
    measures |= {f"{c} after stage 3": v for c, v in columns(read_scores(folder)).items()}
    measures["LM loss before"] = probes.lm_loss(Embedder(lm), texts)
    measures["LM loss after"] = probes.lm_loss(Embedder(folder), texts)
    half = cfg.save_every                          # the one checkpoint before the last
    places = {"start": (lm, 0), "half": (folder / f"step_{half:06d}", half - 1),
              "end": (checkpoint.latest(folder), cfg.steps - 1)}
    for place, (path, step) in places.items():
        ranks = probes.attention_ranks(Embedder(path, dtype="float32"), texts[:32],
                                       stage_mask(cfg, step))
        for name, value in zip(("Rank of M", "Effective rank of M",
                                "Effective rank of attention"), ranks):
            measures[f"{name}, {place}"] = value
    return measures


def sec32(lab):
    """Write Sec. 3.2: does the hard switch get stuck, and what does it destroy?"""
    texts = [document_text(row) for row in load_collection(f"{lab.cfg.data}/dev").corpus]
    return make_table(
        lab, "sec32", {"hard": NOTHING, "soft": Cell(), "causal": Cell("causal")},
        measure=partial(switch_measures, texts), transpose=True,
        differences={"soft minus hard": (["soft"], ["hard"])},
        title="Sec. 3.2: does the hard switch get stuck?",
        notes=["All start from the same stage-2 checkpoint. LM loss is in nats a token.",
               f"Ranks are of texts of {probes.RANK_TOKENS} tokens, under the mask of that step."])


# ---------------------------------------------------------------- Sec. 3.3: what CLR teaches

def clr(lab):
    """Write what CLR teaches: parts of the questions, a wrong dictionary, and stage 3 with CLR."""
    parts = probes.parts_of_questions(load_collection(f"{lab.cfg.data}/clr_test"))
    for name in ("whole", "translated words"):
        own = [query for query in parts[name].queries if query["lang"] in TWO]
        parts[f"{name}, {' and '.join(TWO)}"] = dataclasses.replace(parts[name], queries=own)
    count = len({query["id"].rpartition("/")[0] for query in parts["whole"].queries})

    def measure(folder):
        encoder = CachedEncoder(Embedder(folder))
        return {**columns(read_scores(folder)), **{
            name: 100 * retrieval(encoder, part)["ndcg@10"] for name, part in parts.items()}}
    cells = {"without CLR": NOTHING, "CLR": table4_cell(0, 1, 0)}
    cells["CLR by a wrong dictionary"] = dataclasses.replace(cells["CLR"], clr="wrong")
    cells["CLR in stage 3"] = dataclasses.replace(NOTHING, weak_clr="all")
    cells["CLR in stages 3 and 4"] = dataclasses.replace(cells["CLR"], weak_clr="all")
    cells["CLR in stage 3 by a wrong dictionary"] = dataclasses.replace(NOTHING, weak_clr="wrong")
    cells["CLR in stage 3 with few questions"] = dataclasses.replace(NOTHING, weak_clr="few")
    cells["CLR in stage 3 in two languages"] = dataclasses.replace(NOTHING, weak_clr="two")
    wrong = {f"{label}, minus a wrong dictionary": ([label], [f"{label} by a wrong dictionary"])
             for label in ("CLR", "CLR in stage 3")}
    return make_table(
        lab, "clr", cells, stage=SUP, measure=measure, title="What CLR teaches",
        differences={f"{label}, minus without": ([label], ["without CLR"])
                     for label in list(cells)[1:]} | wrong | {
                         "CLR in stage 3, minus in stage 4": (["CLR in stage 3"], ["CLR"]),
                         "CLR in stage 3 with few questions, minus in stage 4": (
                             ["CLR in stage 3 with few questions"], ["CLR"]),
                         "CLR in stage 3, minus few questions": (
                             ["CLR in stage 3"], ["CLR in stage 3 with few questions"]),
                         "CLR in stage 3 in two languages, minus in all": (
                             ["CLR in stage 3 in two languages"], ["CLR in stage 3"]),
                         "CLR in stages 3 and 4, minus in 3": (
                             ["CLR in stages 3 and 4"], ["CLR in stage 3"])},
        notes=[STAGE_4, "CLR is of stage 4, unless stage 3 is named. There its rows are one more "
               "file of pairs. \"In two languages\" each row is in German or Chinese. The \"few "
               "questions\" are those of stage 4, repeated to as many rows.",
               f"The parts are of {count} questions in 25 languages, with and without English "
               "words: the dictionary does not have all."])


# ---------------------------------------------------------------- Sec. 3.4: hard negatives

def hardness(folder):
    """Return S in the first part of the stage and in the last, S_0, loss, replacements, scores.

    S and what follows are of retrieval's steps, and of CLR's where there are any.
    """
    log, measures = read_log(folder), {}
    for task, label in (("retrieval", ""), ("clr", "CLR: ")):
        rows = [row for row in log if row["task"] == task and "S" in row]
        if task == "clr" and not rows:
            continue
        if len(rows) < PARTS:
            raise ValueError(f"{folder}: {len(rows)} steps of {task} are fewer than {PARTS} parts")
        parts = [rows[i * len(rows) // PARTS:(i + 1) * len(rows) // PARTS] for i in range(PARTS)]
        measures |= {f"{label}S, part {i + 1}": mean(parts[i], "S") for i in (0, PARTS - 1)}
        measures |= {f"{label}S_0, last part": mean(parts[-1], "S_0"),
                     f"{label}Loss, last part": mean(parts[-1], "loss"),
                     f"{label}Replaced in a step": mean(rows, "replaced")}
    return measures | columns(read_scores(folder))


def sec34(lab):
    """Write Sec. 3.4: do negatives stay hard if they are replaced?"""
    cells = {"fixed": table4_cell(1, 0, 0), "dynamic": table4_cell(1, 0, 1),
             "fixed CLR": table4_cell(1, 1, 0), "dynamic CLR": table4_cell(1, 1, 1)}
    in_use = lab.base[SUP].batch_size * lab.base[SUP].n_negatives
    return make_table(
        lab, "sec34", cells, stage=SUP, measure=hardness, transpose=True,
        title="Sec. 3.4: do negatives stay hard if they are replaced?",
        differences={f"dynamic minus fixed{c}": ([f"dynamic{c}"], [f"fixed{c}"])
                     for c in ("", " CLR")},
        notes=[STAGE_4,
               "S is the mean cosine of queries and their negatives in use, S_0 at first use.",
               f"A part is a {PARTS}th of stage 4's steps of a task: two visits of a query without "
               f"CLR, one with it. A step has {in_use} negatives.",
               "Pools are 50 deep, mined by the model itself."])


# ---------------------------------------------------------------- the curve over LM tokens

def curve(lab):
    """Write soft minus hard, and what pretraining buys, against LM tokens before stage 3.

    A shorter stage 1 is the beginning of the longest. The last cells have no language model, and
    their stage 3 gets the time of stages 1 and 2 as well. The rate of stage 3 was tuned after the
    longest stage 1; after a shorter one half of it is better (docs/log.md), the other points were
    not tuned. So the last one's time is tried at half and at twice that rate, too.
    """
    base = lab.base[PRETRAIN]
    window = base.batch_size * base.passage_len    # tokens of a step
    points = {n: round(n / window) for n in lab.cfg.lm_tokens} | {window * base.steps: None}
    half = lab.rate(WEAK, Cell()) / 2
    cells = {f"{n / 1e6:g}M {mask}": Cell(schedule, lm_steps=steps,
                                          weak_rate=0.0 if steps is None else half)
             for n, steps in points.items()
             for mask, schedule in (("hard", "hard"), ("soft", "linear"))}
    names, differences = [f"{n / 1e6:g}M" for n in points], {}
    path = Path(lab.cfg.results) / "curve.json"    # its earlier seeds were timed
    timed = read_object(path)["settings"] if path.is_file() else {}
    timed_rows = [(name, half, "") for n, name in zip(points, names) if n >= EQUAL_TIME]
    for name, rate, more in [*timed_rows, (names[-1], half / 2, " at half the rate"),
                             (names[-1], 2 * half, " at twice the rate")]:
        label = f"no LM but time of {name}"
        steps = timed[label]["weak_steps"] if label in timed else \
            steps_of_equal_time(lab, cells[f"{name} hard"])
        cells[label + more] = Cell("hard", lm_steps=0, weak_rate=rate, weak_steps=steps)
        differences[f"{name}: LM minus its time{more}"] = [f"{name} hard"], [label + more]
    return make_table(
        lab, "curve", cells, points=dict(zip(names, points)),
        title="When does the mask pay? Stage 3 against LM tokens seen before it",
        differences={f"{name}: soft minus hard": ([f"{name} soft"], [f"{name} hard"])
                     for name in names} | differences,
        notes=["0M has no stages 1 and 2. All others have the same short stage 2.",
               f"Stage 3 has the tuned rate after {names[-1]} tokens, else half of it. \"At "
               "half\" and \"at twice\" are of that half."])


def steps_of_equal_time(lab, cell):
    """Return the steps of a stage 3 that gets the time of the cell's stages 1 and 2 as well."""
    seed, steps = lab.cfg.seeds[0], lab.base[WEAK].steps
    weak = seconds(read_log(lab.train(seed, WEAK, cell)))
    lm = sum(sum(seconds(read_log(lab.lm_folder(seed, cell) / stage))) for stage in (PRETRAIN, SFT))
    return steps + round(lm / np.median(weak))


STAGE_3_ONLY = ("table12", "sec32", "curve")
COMMANDS = {"tune": lambda lab: lab.work / "rates.json", "table4": table4, "table6": table6,
            "table12": table12, "sec32": sec32, "clr": clr, "sec34": sec34, "curve": curve}


def main(argv=None):
    """Run the command that the first argument names."""
    name, flags = choose(COMMANDS, argv)
    cfg = load_config(AblationConfig, flags)
    if not cfg.seeds or cfg.lm_seeds < 1:
        raise ValueError(f"seeds {cfg.seeds} and lm_seeds {cfg.lm_seeds}: at least one of each")
    lab = Lab(cfg)
    if not cfg.tune:
        lab.tuned = {"rates": {}, "tried": {}}         # those of an earlier command
    else:
        lab.tune(WEAK if name in STAGE_3_ONLY else SUP, with_lora=name in ("tune", "table6"))
    return COMMANDS[name](lab)


if __name__ == "__main__":
    run_command(main)
