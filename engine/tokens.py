"""A run's tokenizer, and the token stream of stage 1: shards that all ranks write and all map.

Shard s holds the documents s * 65,536 and following, each with the end-of-text id after it. The
stream is the shards one after the other, so how it was cut changes no window. A shard that is there
and whole is not built again: a broken build continues after it.
"""
from functools import lru_cache
from pathlib import Path

import numpy as np

from engine.distributed import ALONE, together
from engine.index import text_id
from engine.jsonl import atomic, is_whole, seal
from engine.order import key_of, mix, shuffled
from tokenizer import Tokenizer

DOCUMENTS = 65_536                 # of a shard
OPEN = 256                         # shards that a rank maps at a time, each an open file
TOKENIZER_TEXTS = 400_000          # documents that the tokenizer learns from


def tokenizer_of(rows, vocab_size, folder, seed):
    """Return a tokenizer of texts or pairs; one that was trained on them before is taken.

    PAPER Sec. 3.1.1: it learns from about 400,000 documents, here a seeded sample of as many.
    """
    made_of = " ".join([*rows.hashes, str(vocab_size), Tokenizer.VERSION,
                        str(seed if len(rows) > TOKENIZER_TEXTS else "all")])
    path = Path(folder) / f"tokenizer-{text_id(made_of):016x}.tiktoken"
    if not path.is_file():
        chosen = shuffled(np.arange(min(len(rows), TOKENIZER_TEXTS)), len(rows), seed)
        sample = (rows[int(i)] for i in np.sort(chosen))
        texts = (row if isinstance(row, str) else f"{row['query']}\n{row['pos'][0]}"
                 for row in sample)
        tokenizer = Tokenizer.train(texts, vocab_size)
        with atomic(path, "wb") as file:
            file.write(tokenizer.to_bytes())
    return Tokenizer.load(path)


class TokenStream:
    """All documents of some rows as one stream of uint32 ids in memory-mapped shards.

    Window w of an epoch is `block` + 1 ids. The windows of later epochs start elsewhere, so text is
    not always cut at the same places. The name of `folder` must carry the hash of texts and
    tokenizer: whole shards are not built again. All ranks must call; all must see the folder.
    """

    def __init__(self, rows, tokenizer, folder, seed=0, world=ALONE):
        self.folder, self.seed, n = Path(folder), seed, -(-len(rows) // DOCUMENTS)
        paths = [self.folder / f"{s:06d}.bin" for s in range(n)]
        together(world, lambda: [write_shard(paths[s], s, rows, tokenizer)
                                 for s in range(world.rank, n, world.size)])
        self.starts = np.cumsum([0, *(path.stat().st_size // 4 for path in paths)])
        self._shard = lru_cache(OPEN)(lambda s: np.memmap(paths[s], np.uint32, "r"))

    def __len__(self):
        return int(self.starts[-1])

    def read(self, start, end):
        """Return the ids (end - start,) int64 from one place of the stream to another."""
        out, s = [], int(np.searchsorted(self.starts, start, side="right")) - 1
        while start < end:
            first, stop = int(self.starts[s]), min(end, int(self.starts[s + 1]))
            out.append(self._shard(s)[start - first:stop - first])
            start, s = stop, s + 1
        return np.concatenate(out).astype(np.int64)

    def windows(self, positions, block):
        """Return (len(positions), block + 1) int64 ids of these places in the endless order."""
        n = (len(self) - 1) // block - 1
        if n < 1:
            raise ValueError(f"{len(self)} tokens of text are too few for blocks of {block}")
        place = shuffled(positions, n, self.seed)
        shift = mix(np.asarray(positions, dtype=np.uint64) // np.uint64(n),
                    key_of(self.seed) + 1)
        starts = place * block + (shift % np.uint64(block)).astype(np.int64)
        return np.stack([self.read(s, s + block + 1) for s in starts.tolist()])


def write_shard(path, s, rows, tokenizer):
    """Write shard s of the rows' tokens unless it is there, whole."""
    if is_whole(path):
        return
    end = min((s + 1) * DOCUMENTS, len(rows))
    with atomic(path, "wb") as file:
        for start in range(s * DOCUMENTS, end, 1000):
            texts = [rows[i] for i in range(start, min(start + 1000, end))]
            for ids in tokenizer.encode_batch(texts):
                # numpy's tofile would not see that a disk is full
                file.write(np.array(ids + [tokenizer.eos_id], dtype=np.uint32).tobytes())
    seal(path)
