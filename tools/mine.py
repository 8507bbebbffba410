"""Mine hard negatives for rows, once, on any number of ranks: texts and cosines in the rows.

    torchrun --nproc_per_node=8 -m tools.mine --checkpoint=out/full/embed_weak \
        --input=retrieval.jsonl --out=data/retrieval.jsonl
    python -m tools.mine --checkpoint=out/embed_weak --input=clr.jsonl --out=m.jsonl --task=clr

PAPER Sec. 3.4. A row gets "neg", its own first, then the passages nearest to its query, and
"cosines", one for each. Where all rows of a task have them, stage 4 keeps their order, leaves out
what Eq. (6) discards at once, and embeds nothing; a cap can be applied before, by "pos_cosines".
A run that broke off continues. --lexical adds BM25's best, and then all go by cosine: for small
sets, about 0.1 microseconds of a core a query and passage.
"""
import hashlib
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from configurator import load_config, run_command
from data import parse_pair
from embed import Embedder
from engine import distributed
from engine.bm25 import BM25
from engine.index import JsonlFiles
from engine.jsonl import atomic, check_name, to_line
from engine.mining import Approximate, Exact, Miner
from engine.passages import Passages

PART = 4096                        # rows that one rank writes at a time


@dataclass(frozen=True)
class MineConfig:
    """The settings of `python -m tools.mine`."""
    checkpoint: str                # folder of train.py or of an export
    input: tuple[str, ...]         # JSONL(.gz) files of pairs or retrieval rows, mined together
    out: str                       # JSONL file to write; all ranks must see its folder
    task: Literal["retrieval", "clr", "classification"] = "retrieval"  # clr: around the positive
    depth: int = 50                # candidates of a row
    n_negatives: int = 7           # rows with as many of their own are not searched for
    lexical: int = 0               # of the depth, how many are BM25's
    search: Literal["exact", "faiss"] = "exact"        # faiss: approximate, recall is printed
    device: Literal["auto", "cuda", "npu", "cpu"] = "auto"
    skip_bad_lines: bool = False   # count bad lines instead of stopping at them

    def __post_init__(self):
        check_name(self.out, self.input)
        if not 0 <= self.lexical < self.depth:
            raise ValueError(f"lexical {self.lexical} must lie in 0 .. depth {self.depth} - 1")


def parse_row(row):
    """Return a row of pairs as {query, pos, neg, prompt} and the keys that have no part in that."""
    own = ("instruction", "input", "output", "cosines")
    return {key: value for key, value in {**row, **parse_pair(row)}.items() if key not in own}


def with_lexical(rows, passages, n):
    """Return a function: row q -> its own negatives, and BM25's n best passages beside them."""
    bm25 = BM25(passages.text(i) for i in range(len(passages)))

    def given(q):
        own, known = passages.negatives(q).tolist(), passages.positives(q).tolist()
        (best,), (scores,) = bm25.top_k([rows[q]["query"]], n + len(own) + len(known))
        return own + [i for i in best[scores > 0].tolist() if i not in {*own, *known}][:n]
    return given


def recall(search, queries, depth):
    """Return the share of the exact nearest passages that approximate search finds."""
    ask = [[[] for _ in queries], depth, [True] * len(queries)]
    exact, _ = Exact(search.passages, search.device).nearest(queries, *ask)
    return float(np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(
        exact, search.nearest(queries, *ask)[0])]))


def mine_rows(cfg, world):
    """Write the rows with their negatives; all ranks must call."""
    rows = JsonlFiles(cfg.input, parse_row, skip_bad=cfg.skip_bad_lines, ids=True, world=world)
    passages, embedder = Passages(rows, world), Embedder(cfg.checkpoint, world.device)
    made_of = [embedder.fingerprint(), *rows.hashes, cfg.task, cfg.depth, cfg.lexical,
               cfg.n_negatives, cfg.search, embedder.dtype]
    folder = Path(f"{cfg.out}.{hashlib.sha256(str(made_of).encode()).hexdigest()[:16]}")
    miner = Miner(folder, embedder, world)
    search, queries = miner.passages("all", passages), None
    if cfg.task != "clr":
        queries = miner.queries("all", rows, embedder.prompts.get(cfg.task))
    if cfg.search == "faiss":
        search = Approximate(search.passages, folder / "index.faiss", world.device, world)
        if world.is_main:
            sample = (search.passages if queries is None else queries)[:256]
            print(f"recall of faiss against exact search: {recall(search, sample, cfg.depth):.3f}")
    if cfg.lexical and world.is_main:
        print(f"BM25: about {1e-7 * len(rows) * len(passages) / world.size / 60:,.1f} minutes")
    pools, scores = miner.pools(
        "all", passages, queries, search, (cfg.depth, cfg.n_negatives + cfg.lexical),
        given=with_lexical(rows, passages, cfg.lexical) if cfg.lexical else None)

    def write(first):
        path, end = folder / f"{first:012d}.jsonl", min(first + PART, len(rows))
        if path.is_file():
            return
        part = range(first, end)
        vectors = queries[first:end] if queries is not None else \
            search.passages[np.array([passages.positives(q)[0] for q in part])]
        positives = search.cosines(vectors, [passages.own(q, "pos") for q in part])
        with atomic(path, "wb") as file:
            for q, pos in zip(part, positives):
                there = np.flatnonzero(pools[q] >= 0)
                if cfg.lexical:
                    there = there[np.argsort(-scores[q][there], kind="stable")]
                row = {**rows[q], "neg": [passages.text(n) for n in pools[q][there]],
                       "cosines": [round(float(s), 6) for s in scores[q][there]],
                       "pos_cosines": [round(float(s), 6) for s in pos]}
                file.write(to_line({k: v for k, v in row.items() if v is not None}))
    firsts = range(0, len(rows), PART)
    distributed.together(world, lambda: [write(first) for first in tqdm(
        firsts[world.rank::world.size], desc="write", disable=None if world.is_main else True)])
    world.on_main(lambda: join([folder / f"{first:012d}.jsonl" for first in firsts], cfg.out))
    if world.is_main:
        print(f"{cfg.out}: {len(rows):,} rows, {rows.bad:,} bad lines left out")


def join(parts, out):
    """Write the parts one after the other as one file, and remove their folder."""
    with atomic(out, "wb") as file:
        for path in parts:
            with open(path, "rb") as part:
                shutil.copyfileobj(part, file)
    shutil.rmtree(parts[0].parent, ignore_errors=True)     # NFS keeps what is still mapped


def main(argv=None):
    """Mine rows; see the module docstring."""
    cfg = load_config(MineConfig, argv)
    world = distributed.start(cfg.device)
    try:
        mine_rows(cfg, world)
    finally:
        distributed.stop(is_orderly=sys.exc_info()[0] is None)


if __name__ == "__main__":
    run_command(main)
