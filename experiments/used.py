"""The paper's tables of data, Table 10 and 11: what the stages of a run were trained on.

    python -m experiments.tables table10                  # the run in out/
    python -m experiments.tables table11 --out=out/real

Rows are counted in the files, steps by asking the code that draws them once more (the task of a
step and its size are functions of the settings), tokens by the log of the run.
"""
from pathlib import Path

import numpy as np
import torch

from data import Rows, task_of_step
from engine.distributed import World
from experiments import layout, paper
from experiments.runs import Missing, Run
from mixture import build_tasks, sources
from tokenizer import Tokenizer
from train import STAGES

WEAK, SUP = STAGES[2:]


def drawn(run, stage):
    """Return [(kind, files, rows, steps, examples drawn)] of a stage, by the code that draws."""
    cfg, steps = run.settings(stage), run.config(stage)["step"]
    if stage in STAGES[:2]:
        kind = "text" if stage == STAGES[0] else "pairs"
        files = need_sources(run, cfg, kind)
        return [(kind, files, len(Rows(files, kind, skip_bad=cfg.skip_bad_lines)), steps,
                 steps * cfg.batch_size)]
    if stage == WEAK:
        need_sources(run, cfg, "pairs")
    found = build_tasks(cfg, Tokenizer.load(run.folder / "tokenizer.tiktoken"),
                        World(0, 1, torch.device("cpu")))
    order = task_of_step(np.arange(cfg.steps), [weight for _, weight in found], cfg.seed)[:steps]
    times = np.bincount(order, minlength=len(found)).tolist()
    return [(task.kind, [str(file.path) for file in task.rows.files], len(task.rows), n,
             n * task.size) for (task, _), n in zip(found, times)]


def need_sources(run, cfg, kind):
    """Return the files of a kind; raise Missing if they are gone."""
    files = sources(cfg, kind)
    if not files:
        raise Missing(f"the {kind} that {run.folder / cfg.stage} was trained on are not in "
                      f"{cfg.root or cfg.docs}; make them by: {run.command(cfg.stage)}")
    return files


def table10(cfg):
    """Write Table 10: texts and pairs of the stages before the supervised one."""
    run = Run(cfg.out[0])
    rows = [{"Source": "paper", **row} for row in paper.rows(paper.TABLE_10)]
    forms = ("(text)", "(instruction, input, output)", "(query, positive)")
    for stage, form in zip(STAGES, forms):
        found = [{"Source": stage, "Categories": ", ".join(Path(file).stem for file in files),
                  "Data Format": form, "Numbers": n, "Steps": steps, "Drawn": examples,
                  "Epochs": examples / n} for _, files, n, steps, examples in drawn(run, stage)]
        if len(found) > 1:
            found.append({"Source": stage, "Categories": "all", **{
                key: sum(row[key] for row in found) for key in ("Numbers", "Steps", "Drawn")}})
        found[-1]["Tokens"] = run.log(stage)[-1]["tokens"]
        rows += found
    return layout.write(cfg, "table10", "Table 10: data before the supervised stage", rows, [
        "Numbers: pairs (the paper), rows of the files (here). Drawn: examples that the steps of "
        "the run took from them, windows of text in pretraining. Tokens: of all of the stage's "
        "texts, from its log"])


def table11(cfg):
    """Write Table 11: rows of the supervised tasks."""
    run = Run(cfg.out[0])
    found = {kind: rest for kind, *rest in drawn(run, SUP)}
    rows = []
    for row in paper.rows(paper.TABLE_11):
        _, n, steps, examples = found.get(row["Tasks"].lower(), (None,) * 4)
        rows.append({"Tasks": row["Tasks"], "Data Format": row["Data Format"],
                     "Numbers, paper": row["Numbers"], "Rows": n, "Steps": steps,
                     "Drawn": examples, "Epochs": examples / n if n else None})
    tokens = run.log(SUP)[-1]["tokens"]
    rows.append({"Tasks": "all", **{key: sum(row[key] or 0 for row in rows)
                                    for key in ("Rows", "Steps", "Drawn")}, "Tokens": tokens})
    return layout.write(cfg, "table11", "Table 11: data of the supervised stage", rows, [
        "Drawn: rows that the run's steps took. Tokens: of all texts, hard negatives included, "
        f"from {run.folder / SUP / 'log.jsonl'}. An empty row: the run had no such rows"])
