"""The token stream of stage 1: shards on disk that all ranks write together and all map.

Shard s holds the documents s * 65,536 and following, each with the end-of-text id after it. The
stream is the shards one after the other, so how it was cut changes no window. `shards.json` has the
size, time and SHA-256 of each. A shard that exists is whole: a broken build continues after it.
"""
import hashlib
import json
from collections import OrderedDict
from pathlib import Path

import numpy as np
from tqdm import tqdm

from engine.index import ALONE, together
from engine.jsonl import atomic
from engine.order import mix, shuffled

DOCUMENTS = 65_536                 # of a shard
OPEN = 256                         # shards that a rank maps at a time


class TokenStream:
    """All documents of some rows as one stream of uint32 ids in memory-mapped shards.

    Window w of an epoch is `block` + 1 ids. The windows of later epochs start elsewhere, so text is
    not always cut at the same places. The name of `folder` must carry the hash of texts and
    tokenizer: whole shards are not built again. All ranks must call; all must see the folder.
    """

    def __init__(self, rows, tokenizer, folder, seed=0, world=ALONE):
        self.folder, self.seed = Path(folder), seed
        shards = self._known(rows, world)
        if shards is None:
            parts = together(world, lambda: {s: self._shard(s, rows, tokenizer) for s in range(
                world.rank, -(-len(rows) // DOCUMENTS), world.size)})
            shards = [entry for _, entry in sorted({k: v for part in parts
                                                    for k, v in part.items()}.items())]
            together(world, lambda: self._write(shards) if world.is_main else None)
        self.ends = np.cumsum([shard["bytes"] // 4 for shard in shards])
        self._open = OrderedDict()

    def _path(self, s):
        return self.folder / f"{s:06d}.bin"

    def _shard(self, s, rows, tokenizer):
        """Write shard s unless it exists; return its entry of shards.json."""
        path = self._path(s)
        if not path.is_file():
            end = min((s + 1) * DOCUMENTS, len(rows))
            with atomic(path, "wb") as file:
                for start in range(s * DOCUMENTS, end, 1000):
                    texts = [rows[i] for i in range(start, min(start + 1000, end))]
                    for ids in tokenizer.encode_batch(texts):
                        np.array(ids + [tokenizer.eos_id], dtype=np.uint32).tofile(file)
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        stat = path.stat()
        return {"bytes": stat.st_size, "time": stat.st_mtime_ns, "sha256": digest}

    def _write(self, shards):
        with atomic(self.folder / "shards.json") as file:
            json.dump(shards, file)

    def _known(self, rows, world):
        """Return the entries of shards.json, or None if something has to be built.

        Each rank looks at its share. A shard of another time is read again; one of other content is
        named and removed.
        """
        def check():
            try:
                shards = json.loads((self.folder / "shards.json").read_bytes())
                if len(shards) != -(-len(rows) // DOCUMENTS):
                    return None
                bad = [s for s in range(world.rank, len(shards), world.size)
                       if not self._is_whole(s, shards[s])]
            except (OSError, ValueError, LookupError, TypeError):
                return None
            for s in bad:
                tqdm.write(f"{self._path(s)}: changed since it was written; it is built again")
                self._path(s).unlink(missing_ok=True)
            return None if bad else shards
        answers = together(world, check)
        return None if None in answers else answers[0]

    def _is_whole(self, s, entry):
        path = self._path(s)
        stat = path.stat() if path.is_file() else None
        if stat is None or stat.st_size != entry["bytes"]:
            return False
        if stat.st_mtime_ns == entry["time"]:
            return True
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]

    def __len__(self):
        return int(self.ends[-1])

    def read(self, start, end):
        """Return the ids (end - start,) int64 from one place of the stream to another."""
        out, s = [], int(np.searchsorted(self.ends, start, side="right"))
        while start < end:
            first = int(self.ends[s - 1]) if s else 0
            stop = min(end, int(self.ends[s]))
            out.append(self._map(s)[start - first:stop - first])
            start, s = stop, s + 1
        return np.concatenate(out).astype(np.int64)

    def _map(self, s):
        if s not in self._open:
            self._open[s] = np.memmap(self._path(s), np.uint32, "r")
            if len(self._open) > OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(s)
        return self._open[s]

    def windows(self, positions, block):
        """Return (len(positions), block + 1) int64 ids of these places in the endless order."""
        n = (len(self) - 1) // block - 1
        if n < 1:
            raise ValueError(f"{len(self)} tokens of text are too few for blocks of {block}")
        place = shuffled(positions, n, self.seed)
        shift = mix(np.asarray(positions, dtype=np.uint64) // np.uint64(n), self.seed + 1)
        starts = place * block + (shift % np.uint64(block)).astype(np.int64)
        return np.stack([self.read(s, s + block + 1) for s in starts.tolist()])
