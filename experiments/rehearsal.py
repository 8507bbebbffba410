"""Rehearse all that comes before a stage's first step, on made-up rows: seconds, memory, disk.

    python -m experiments.rehearsal                                   # minutes, 10 GB of disk
    python -m experiments.rehearsal --rows=100000,1000000,10000000    # an hour or two, 60 GB

Each part runs in processes of its own, which meet through gloo. A rank's seconds are those of its
CPU, so that more ranks than cores give the same numbers as an idle machine. Its memory is what it
holds besides mapped files. The law is linear: seconds of one rank for a unit of data, divided by
the ranks; exact search has its FLOPs, and the share of a plain matmul's rate that the code reaches.
Writes results/rehearsal.json: `python -m experiments.results` fills the tables of docs/scale.md
from it, and `train.py --dry_run` reads the law.
"""
import json
import math
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

import data
from configurator import load_config, run_command
from engine import budget, distributed, memory, run
from engine.jsonl import atomic, read_object
from engine.mining import CHUNK, Exact, Miner, mine, shared
from engine.passages import Passages
from engine.pools import pool_of
from engine.tokens import TokenStream
from experiments.results import ROOT, markdown
from experiments.runs import write_result
from tokenizer import Tokenizer
from train import TrainConfig

UNITS = {                              # part of a start: the unit that its cost is given for
    "index of text": "GB", "token shards": "million tokens", "index of pairs": "GB",
    "second start": "GB", "index of stage 4": "million rows", "passage tables": "million rows",
    "pools of mined rows": "million rows", "exact search": "TFLOP"}
PAPER = {                              # tokens of stage 1, rows of the others
    "pretrain": {"text": 3e12}, "sft": {"pairs": 0.6e9}, "embed_weak": {"pairs": 1.77e9},
    "embed_sup": {"retrieval": 3e6, "clr": 3e6, "classification": 2.8e6, "sts": 1.8e6}}
SEARCH, WIDTH = 16_384, 256            # queries and passages of the exact search, and their width
WORDS = "sort list tree graph node edge file open read write matrix vector random time".split()


@dataclass(frozen=True)
class RehearsalConfig:
    """The settings of `python -m experiments.rehearsal`."""
    rows: tuple[int, ...] = (100_000, 1_000_000)   # of each kind of file
    ranks: tuple[int, ...] = (1, 2, 4)
    results: str = "results"
    work: str = ""                 # what the command calls itself with: the folder of one rehearsal


# ---------------------------------------------------------------- rows

def write_rows(folder, n):
    """Write n rows of text, of pairs and of stage 4, as tools/mine.py leaves them."""
    rng = random.Random(0)
    part = [" ".join(rng.choices(WORDS, k=16)) for _ in range(997)]        # some 80 characters
    with atomic(folder / "text.jsonl") as file:
        for i in range(n):
            text = " ".join(part[(i + k * k) % 997] for k in range(6))
            file.write(f'{{"text": "Document {i}. {text}"}}\n')
    with atomic(folder / "pairs.jsonl") as file:
        for i in range(n):
            file.write(f'{{"query": "question {i}", '
                       f'"pos": "{part[i % 997]} {part[i % 991]} {i}"}}\n')
    cosines = json.dumps([round(0.9 - k / 20, 2) for k in range(8)])
    with atomic(folder / "retrieval.jsonl") as file:
        for i in range(n):
            neg = ", ".join(f'"passage {(7 * i + k * k + 1) % n} {part[k]}"' for k in range(8))
            file.write(f'{{"query": "question {i}", "pos": "passage {i} {part[i % 8]}", '
                       f'"neg": [{neg}], "cosines": {cosines}}}\n')
    Tokenizer.train(part, 400).save(folder / "tokenizer.tiktoken")


# ---------------------------------------------------------------- what one rank does

class Meter:
    """Measure parts: {part: {"seconds" of CPU, "MB" beyond mapped files}}, worst rank."""

    def __init__(self, world):
        self.world, self.parts = world, {}

    def __call__(self, name, work):
        """Call `work()` and note what it took; return its result."""
        before, peak, done = memory.held("RssAnon"), [0], threading.Event()

        def watch():
            while not done.wait(0.02):
                peak[0] = max(peak[0], memory.held("RssAnon"))
        thread = threading.Thread(target=watch, daemon=True)
        distributed.together(self.world, thread.start)
        cpu = time.process_time()
        result = work()
        seconds = time.process_time() - cpu
        done.set()
        thread.join()
        most = max(0, max(peak[0], memory.held("RssAnon")) - before) * 1e3
        worst = np.max(self.world.gather_objects([seconds, most]), axis=0).tolist()
        self.parts[name] = dict(zip(("seconds", "MB"), worst))
        return result


def rehearse(folder, world):
    """Run every part of the starts in a folder of rows -> {part: what it took, and how much}."""
    meter, cache = Meter(world), folder / f"cache{world.size}"

    def rows(kind):
        return data.open_rows([folder / f"{kind}.jsonl"], kind, cache, world=world)
    text = meter("index of text", lambda: rows("text"))
    tokens = meter("token shards", lambda: TokenStream(
        text, Tokenizer.load(folder / "tokenizer.tiktoken"), cache / "tokens", 0, world))
    meter("index of pairs", lambda: rows("pairs"))
    meter("second start", lambda: rows("pairs"))
    supervised = meter("index of stage 4", lambda: rows("retrieval"))
    passages = meter("passage tables", lambda: Passages(supervised, world))

    def fill():
        pools, _ = Miner(cache / "mining", None, world).of_rows(
            "retrieval", passages, 50, partial(data.without_easy, n=7))
        return pool_of(pools, world, 7, "v2")
    meter("pools of mined rows", fill)

    def draw(first, end):
        vectors = np.random.default_rng(first).standard_normal((end - first, WIDTH), np.float32)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = shared(cache / "vectors", (SEARCH, WIDTH), np.float16, 1024, draw, world)
    meter("exact search", lambda: shared(
        cache / "pools", (SEARCH, 50), np.int32, 1024, lambda first, end: mine(
            vectors[first:end], Exact(vectors), [[q] for q in range(first, end)], 50)[0], world))
    size = {kind: (folder / f"{kind}.jsonl").stat().st_size for kind in ("text", "pairs")}
    amounts = [size["text"] / 1e9, len(tokens) / 1e6, *[size["pairs"] / 1e9] * 2,
               *[len(supervised) / 1e6] * 3, 2 * SEARCH ** 2 * WIDTH / 1e12]
    for part, amount in zip(UNITS, amounts):
        meter.parts[part]["amount"] = amount
    return {"parts": meter.parts, "disk": disk(cache), "matmul": plain_rate(vectors)}


def disk(cache):
    """Return {file: bytes} of what the start leaves on disk."""
    return {kind: sum(path.stat().st_size for path in cache.rglob(f"*.{kind}"))
            for kind in ("bin", "tab", "idx")}


def plain_rate(vectors):
    """Return the TFLOP/s of a plain float32 matmul of the search's shapes on one thread."""
    block = torch.from_numpy(vectors[:SEARCH].astype(np.float32))
    began, n = time.process_time(), min(4096, len(block))
    for start in range(0, n, CHUNK):
        block[start:start + CHUNK] @ block.T
    return 2 * n * len(block) * WIDTH / 1e12 / (time.process_time() - began)


def worker(folder):
    """Be one rank of a rehearsal; the main rank writes FOLDER/RANKS.json."""
    world = distributed.start("cpu")
    torch.set_num_threads(1)
    measured = rehearse(Path(folder), world)
    if world.is_main:
        write_result(folder, world.size, measured)
    distributed.stop()


# ---------------------------------------------------------------- the command

def launch(folder, ranks):
    """Run one rehearsal on some ranks; return what its main rank wrote."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               f"--nproc_per_node={ranks}", "-m", "experiments.rehearsal", f"--work={folder}"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return read_object(folder / f"{ranks}.json")


def fit(runs):
    """Return the law of {rows: {ranks: rehearsal}}: seconds and bytes for a unit, one rank.

    The seconds are those of the largest files on the fewest ranks.
    """
    largest = runs[max(runs)]
    one = largest[min(largest)]
    law = {part: {"seconds": cost["seconds"] * min(largest) / cost["amount"], "unit": UNITS[part]}
           for part, cost in one["parts"].items()}
    n, tokens = max(runs) / 1e6, one["parts"]["token shards"]["amount"]
    law["exact search"]["share"] = 1 / law["exact search"]["seconds"] / one["matmul"]
    law["disk"] = {"a token": one["disk"]["bin"] / tokens / 1e6,
                   "a row of stage 4": (one["disk"]["tab"] + one["disk"]["idx"]) / n / 1e6 - 16}
    law["bytes"] = {"a token of text": one["parts"]["index of text"]["amount"] * 1e3 / tokens,
                    "a pair": one["parts"]["index of pairs"]["amount"] * 1e3 / n}
    return law


def table_of(runs):
    """Return the rows of the table: what a unit costs, by size and ranks, and memory.

    power of rows: the exponent x of seconds = c * rows ** x between the smallest and largest files.
    Of milliseconds there is neither a power nor a share.
    """
    small, large = min(runs), max(runs)
    first = min(runs[large])
    rows = []
    for part, unit in UNITS.items():
        row = {"part": part, "unit": unit}
        for n in runs:
            cost = runs[n][first]["parts"][part]
            row[f"s a unit, {n:,} rows"] = cost["seconds"] / cost["amount"]
        ends = [runs[n][first]["parts"][part] for n in (small, large)]
        is_long = ends[1]["seconds"] > 0.05
        if is_long and ends[1]["amount"] > ends[0]["amount"]:
            row["power of rows"] = math.log(ends[1]["seconds"] / ends[0]["seconds"]) / math.log(
                ends[1]["amount"] / ends[0]["amount"])
        row |= {f"{ranks} ranks, share of it": runs[large][ranks]["parts"][part]["seconds"]
                / ends[1]["seconds"] for ranks in runs[large] if ranks > first and is_long}
        row |= {f"MB a rank, {n:,}": runs[n][first]["parts"][part]["MB"] for n in (small, large)}
        rows.append(row)
    return rows


def projection(law):
    """Return the rows of the table: minutes, disk and memory at the paper's own numbers."""
    rows = []
    for cfg in run.chain(TrainConfig, [str(ROOT / "config/full/embed_sup.py")]):
        amount, shape = PAPER[cfg.stage], cfg.model_config()
        sizes = budget.start_bytes(law, cfg.stage, amount, cfg)
        for part, alone in budget.start_minutes(law, cfg.stage, amount, 1, shape).items():
            rows.append({"stage": cfg.stage, "amount": f"{sum(amount.values()):.3g}",
                         "part": part,
                         **{f"min, {n} ranks": alone / n for n in (1, 16, 64)},
                         "GB on disk": sizes["disk"] / 1e9 if part == "index" else None,
                         "GB of all ranks, DHNM": sizes["pools"] / 1e9 if part == "pools"
                         else None})
    return rows


def main(argv=None):
    """Rehearse on every size and number of ranks; write the results file, print its table."""
    cfg = load_config(RehearsalConfig, argv)
    if cfg.work:
        return worker(cfg.work)
    runs = {}
    with tempfile.TemporaryDirectory() as temporary:
        for n in cfg.rows:
            folder = Path(temporary) / str(n)      # some 4 GB for a million; TMPDIR says where
            write_rows(folder, n)
            runs[n] = {ranks: launch(folder, ranks) for ranks in cfg.ranks}
    law, table = fit(runs), table_of(runs)
    write_result(cfg.results, "rehearsal", {
        "title": "What comes before the first step", "law": law, "runs": runs,
        "tables": {"rehearsal": table, "start": projection(law)}})
    print("\n".join(markdown(table)))


if __name__ == "__main__":
    run_command(main)
