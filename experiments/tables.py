"""Tables of finished runs: their scores, natural questions, the exercises of docs/exercises.md.

    python -m experiments.tables default_run --out=out,out/seed1   # results/default_run.json
    python -m experiments.tables small --out=out/small             # the same of config/small
    python -m experiments.tables questions --out=out,out/small     # results/questions.json
    python -m experiments.tables exercises                         # those that have been done
    python -m experiments.tables exercises --out=out,out/seed1     # on two seeds

`questions` asks 100 questions that were written by hand in ten languages, and never looked at while
a recipe was chosen. Each names the functions of the installed documentation that answer it.
MKQA's protocol is one command of its own: `python eval.py --mkqa=FOLDER`. Nothing is trained here.
"""
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from configurator import load_config, run_command
from embed import Embedder
from engine.bm25 import BM25
from engine.collection import document_text, load_collection
from engine.jsonl import read_jsonl, read_object
from engine.vectors import load_index
from experiments.probes import attention_to_later
from experiments.results import lines_of
from experiments.runs import (choose, mean, ndcg_by_dims, read_log, read_scores, score_of, seconds,
                              write_result)
from mask import MaskSpec
from train import STAGES

SFT, WEAK, SUP = STAGES[1:]
RUN_ROWS = ("BM25", *STAGES)
RUN_COLUMNS = {                    # column of a run's table: (start, end) of the score's key
    "LM loss before": ("lm/", "/loss_before"), "LM loss": ("lm/", "/loss"),
    "nDCG@10": ("retrieval/", "/test/ndcg@10"),
    "26 languages": ("retrieval/clr_test/mean/", "/ndcg@10"), "STS": ("sts/", "/spearman"),
    "classes": ("classification/", "/accuracy")}
QUESTIONS = Path(__file__).parent.parent / "tests" / "data" / "natural_questions.jsonl"
EXERCISES = {                      # {name: {row: folder of a stage, below each OUT}}
    "language_model": {"after stages 1 and 2": WEAK, "from random weights": f"no_lm/{WEAK}"},
    "logits": {"logits + log M": WEAK, "logits x M": f"logits/{WEAK}"},
    "dhnm": {"fixed": f"fixed/{SUP}", "v2": f"v2/{SUP}"},
    "language": {"after stage 3": f"xx/{WEAK}", "after stage 4": f"xx/{SUP}"}}


@dataclass(frozen=True)
class TablesConfig:
    """The settings of `python -m experiments.tables COMMAND`."""
    out: tuple[str, ...] = ("out",)    # folders of train.py; but for questions: one a seed
    corpus: str = "out/installed_docs/search"          # of questions: a folder with corpus.jsonl
    k: int = 10                    # of questions: how many results count
    results: str = "results"


# ---------------------------------------------------------------- whole runs

def row_of(scores):
    """Return {column: number} of a stage of a run, or of a baseline; MRL's dims are columns."""
    row = {name: score_of(scores, *key) for name, key in RUN_COLUMNS.items()}
    row |= {f"{dims} dims": value for dims, value in ndcg_by_dims(scores).items()}
    return {name: value for name, value in row.items() if value is not None}


def whole_runs(cfg, title):
    """Return the scores of each stage and of BM25, from the summary.json of some runs."""
    runs = {run: read_object(Path(run) / "summary.json") for run in cfg.out}
    cells = {label: {str(i): row_of(summary[label])
                     for i, (run, summary) in enumerate(runs.items()) if label in summary}
             for label in RUN_ROWS}
    steps = {run: {stage: sum(seconds(read_log(Path(run) / stage))) / 60 for stage in STAGES
                   if (Path(run) / stage / "log.jsonl").is_file()} for run in runs}
    fastest = min(runs, key=lambda run: sum(steps[run].values()))
    minutes, cores = runs[fastest]["minutes"], runs[fastest]["cores"]
    start = (f"The fastest run took {minutes:.1f} minutes and {runs[fastest]['memory_gb']:.1f} GB "
             f"on {cores} cores; of the minutes steps of ")
    if minutes < sum(steps[fastest].values()):
        start = "The runs were made in parts, stage by stage. Minutes of steps in the fastest: "
    return {"title": title, "seeds": list(range(len(runs))), "cells": cells,
            "notes": [start + ", ".join(f"{stage} {number:.1f}" for stage, number in
                                        steps[fastest].items()) + "."]}


# ---------------------------------------------------------------- natural questions

def accuracy_by_language(questions, ranking, names):
    """Return {language: share of its questions with an expected name in the ranking}, and "mean".

    ranking: (Q, k) document numbers; names: the documents' ids.
    """
    hits = defaultdict(list)
    for question, ranks in zip(questions, ranking):
        hits[question["lang"]].append(bool({names[i] for i in ranks} & set(question["expected"])))
    shares = {lang: float(np.mean(own)) for lang, own in hits.items()}
    return {**shares, "mean": float(np.mean(list(shares.values())))}


def questions(cfg):
    """Return how often an expected function is among the first k, by language, beside BM25."""
    rows = list(read_jsonl(QUESTIONS, {"lang": str, "query": str, "expected": list}))
    texts = [row["query"] for row in rows]
    rankings = {}
    for out in cfg.out:
        embedder = Embedder(Path(out) / SUP)
        documents, vectors = load_index(embedder, cfg.corpus)
        scores = embedder.encode(texts, prompt=embedder.prompts["retrieval"]) @ vectors.T   # (Q, N)
        rankings[out] = np.argsort(-scores, axis=1)[:, :cfg.k]
    bm25 = BM25([f"{row['id']} {row['text']}" for row in documents]).top_k(texts, cfg.k)[0]
    names = [row["id"] for row in documents]
    return {"title": f"{len(rows)} natural questions", "tables": {"": [
        {f"top-{cfg.k} accuracy": label, **accuracy_by_language(rows, ranking, names)}
        for label, ranking in {"BM25": bm25, **rankings}.items()]}}


# ---------------------------------------------------------------- exercises

def seen(folder):
    """Return what an exercise looks at in a stage's folder; what the stage lacks is left out.

    Losses and cosines of several tasks cannot be averaged, so they are of stages with one.
    """
    log, scores = read_log(folder), read_scores(folder)
    log = log if len({row["task"] for row in log}) == 1 else []
    row = {"loss, first tenth": mean(log, "loss", 0, 0.1),
           "loss, last tenth": mean(log, "loss", 0.9), "S_0, last fifth": mean(log, "S_0", 0.8),
           "S, last fifth": mean(log, "S", 0.8),
           "replaced a step, last four fifths": mean(log, "replaced", 0.2),
           **{f"nDCG@10 {pair}".removesuffix(" test"): score_of(
               scores, "retrieval/", f"/{pair}/ndcg@10") for pair in ("test", "zh-en", "xx-en")}}
    return {name: value for name, value in row.items() if value is not None}


def add_attention(cfg, cells, runs):
    """Add a column to the exercise of multiplied logits: what the model of stage 2 would see."""
    dev = list(map(document_text, load_collection(Path(cfg.corpus).parent / "dev").corpus[:32]))
    for rows, apply in zip(cells.values(), ("weights", "logits")):
        for seed, out in runs.items():
            rows[seed]["attention to later tokens at alpha 0"] = attention_to_later(
                Embedder(out / SFT), dev, MaskSpec(0.0, apply=apply))


def exercises(cfg):
    """Return the tables of the exercises that have been done, cells with a seed for each OUT.

    Tables of before stay.
    """
    path, tables = Path(cfg.results) / "exercises.json", {}
    runs = {str(i): Path(out) for i, out in enumerate(cfg.out)}
    if path.is_file():
        tables = read_object(path)["tables"]

    def done(*files):
        return all((out / file).is_file() for out in runs.values() for file in files)

    def cells(labels, measure):                    # measure(label, folder of a run) -> a row
        return {"seeds": list(range(len(runs))), "cells": {
            label: {seed: measure(label, out) for seed, out in runs.items()} for label in labels}}

    for name, folders in EXERCISES.items():
        if done(*(f"{folder}/eval.json" for folder in folders.values())):
            tables[name] = cells(folders, lambda label, out: seen(out / folders[label]))
            if len(runs) > 1:
                first, second = folders
                tables[name]["differences"] = {f"{second}, minus {first}": [[second], [first]]}
            if name == "logits":
                add_attention(cfg, tables[name]["cells"], runs)
    if done("mine/summary.json"):
        scores = {out: read_object(out / "mine/summary.json") for out in runs.values()}
        labels = [label for label in RUN_ROWS if label in scores[runs["0"]]]
        tables["pairs"] = cells(labels, lambda label, out: {
            "nDCG@10": score_of(scores[out][label], "", "/test/ndcg@10")})
    if not tables:
        raise ValueError(f"{', '.join(cfg.out)}: no exercise of docs/exercises.md was done there")
    return {"title": "Exercises", "tables": tables}


COMMANDS = {"default_run": partial(whole_runs, title="Default run"),
            "small": partial(whole_runs, title="The recipe of config/small"),
            "questions": questions, "exercises": exercises}


def main(argv=None):
    """Make the table that the first argument names; print it and write RESULTS/NAME.json."""
    name, flags = choose(COMMANDS, argv)
    cfg = load_config(TablesConfig, flags)
    table = COMMANDS[name](cfg) | {
        "command": " ".join(["python -m experiments.tables", name, *flags])}
    print("\n".join(lines_of(table)))
    return write_result(cfg.results, name, table)


if __name__ == "__main__":
    run_command(main)
