"""Hard negatives: embeddings on disk, exact search over them block by block, all of it shared out.

    texts     in blocks of 20,000   ->  embeddings, a file that all ranks map
    queries   in units of up to 32,768   ->  candidates and cosines, side by side in another

A block or unit belongs to one rank, is the same on any number of ranks, and is noted when it is
done, so a broken run continues. Scores of a block of passages are held at a time: never Q x P, and
no rank ever holds all embeddings. Files are 16-bit where they would be large. PAPER Sec. 3.4.
"""
import contextlib
import os
from pathlib import Path

import numpy as np
import torch

from engine.distributed import ALONE, together
from engine.jsonl import atomic

TEXTS = 20_000                     # texts that one rank embeds at a time
UNIT = 32_768                      # queries that one rank searches with at a time, at most
CHUNK = 256                        # of them that are scored together; more on an accelerator
BLOCK = 65_536                     # passages that they are scored against at a time
LARGE = 2e9                        # bytes of float32 embeddings that become float16


# ---------------------------------------------------------------- search

def mine(queries, passages, positives, depth=50, *, given=None, n_given=0):
    """Return (candidates, cosines), each (Q, depth): hard negatives of each query, hardest first.

    queries (Q, D), passages (P, D): normalised embeddings, float32 or float16, in memory or mapped;
    passages may be an `Exact` or `Approximate`. Candidates are int64 passage numbers padded with
    -1, cosines float32; equal cosines go by number. A query's `positives` are left out. Its `given`
    negatives come first; passages are searched for only if there are none, or fewer than `n_given`.
    """
    search = passages if isinstance(passages, Exact) else Exact(passages)
    own = [np.asarray(numbers, dtype=np.int64) for numbers in given or [()] * len(queries)]
    scores = search.cosines(queries, own)
    needy = [len(numbers) < max(n_given, 1) for numbers in own]
    near, near_scores = search.nearest(
        queries, [[*p, *o] for p, o in zip(positives, own)], depth, needy)
    pool = np.full((len(queries), depth), -1, dtype=np.int64)
    out = np.zeros((len(queries), depth), dtype=np.float32)
    for q, row in enumerate(scores):
        best, ok = np.argsort(-row, kind="stable"), near[q] >= 0
        chosen = np.concatenate([own[q][best], near[q][ok]])[:depth]
        pool[q, :len(chosen)] = chosen
        out[q, :len(chosen)] = np.concatenate([row[best], near_scores[q][ok]])[:depth]
    return pool, out


class Exact:
    """Exact search over passages (P, D), block by block; never holds Q x P scores."""

    def __init__(self, passages, device="cpu"):
        self.passages, self.device = passages, torch.device(device)

    def _load(self, vectors):
        """Put vectors on the device; a CPU computes in float32."""
        vectors = torch.from_numpy(np.array(vectors)).to(self.device)
        return vectors if vectors.is_cuda else vectors.float()

    def _product(self, queries, block):
        """Return the float32 cosines (chunk, b) of queries and a block of passages, both loaded."""
        queries = queries.to(block.dtype)                  # either may lie in 16 bits, alone
        if block.is_cuda and block.dtype == torch.float16:
            return torch.mm(queries, block.T, out_dtype=torch.float32)
        return queries @ block.T

    def cosines(self, queries, numbers):
        """Return for each query its cosines with the passages `numbers[q]`: float32 arrays.

        The passages of a chunk of queries are read once each.
        """
        out = []
        for start in range(0, len(queries), CHUNK):
            part = numbers[start:start + CHUNK]
            distinct, place = np.unique(np.concatenate(part), return_inverse=True)
            scores = self._product(self._load(queries[start:start + CHUNK]),
                                   self._load(self.passages[distinct.astype(np.int64)]))
            ends = np.cumsum([len(n) for n in part])
            out += [row[columns] for row, columns in zip(
                scores.cpu().numpy(), np.split(place.reshape(-1), ends[:-1]))]
        return out

    def nearest(self, queries, without, depth, needy):
        """Return (numbers, cosines) (Q, k) of the nearest passages but `without`; -1 padded.

        Only chunks with a query that is `needy` are searched, and only such queries get any.
        """
        chunk, k = CHUNK * (1 if self.device.type == "cpu" else 4), min(depth, len(self.passages))
        starts = [s for s in range(0, len(queries), chunk) if any(needy[s:s + chunk])]
        values = torch.full((len(queries), k), -torch.inf, device=self.device)
        numbers = torch.full(values.shape, -1, dtype=torch.int64, device=self.device)
        pairs = {s: _pairs(without[s:s + chunk]) for s in starts}
        loaded = {s: self._load(queries[s:s + chunk]) for s in starts}
        for first in range(0, len(self.passages) if starts else 0, BLOCK):
            block = self._load(self.passages[first:first + BLOCK])
            for s in starts:
                scores = self._product(loaded[s], block)                    # (chunk, b)
                rows, columns = pairs[s]
                here = (columns >= first) & (columns < first + len(block))
                rows, columns = torch.from_numpy(rows[here]), torch.from_numpy(columns[here])
                scores[rows, columns - first] = -torch.inf
                best, column = top(scores, k)
                both = torch.cat([values[s:s + chunk], best], 1)
                which = torch.cat([numbers[s:s + chunk], column + first], 1)
                # low blocks first; of what has no cosine the -1 from above
                both, order = both.sort(dim=1, descending=True, stable=True)
                values[s:s + chunk] = both[:, :k]
                numbers[s:s + chunk] = which.gather(1, order)[:, :k]
        numbers[~torch.tensor(needy, dtype=torch.bool)] = -1
        return numbers.cpu().numpy(), values.cpu().numpy()


class Approximate(Exact):
    """The same by faiss: an inverted file of 8-bit vectors, ranked again by the exact cosines.

    The file takes D bytes a passage; the main rank builds it, all ranks map it.
    """

    def __init__(self, passages, path, device="cpu", world=ALONE):
        super().__init__(passages, device)
        try:
            import faiss
        except ImportError:
            raise ImportError("--search=faiss needs `pip install faiss-cpu`") from None
        world.on_main(lambda: Path(path).is_file() or self._build(faiss, path))
        self.index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
        self.index.nprobe = 32         # of sqrt(P) cells, so many are searched

    def _build(self, faiss, path):
        n, dim = len(self.passages), self.passages[:1].shape[1]
        index = faiss.index_factory(dim, f"IVF{max(1, int(n ** 0.5))},SQ8",
                                    faiss.METRIC_INNER_PRODUCT)
        index.train(self.passages[::max(1, n // 200_000)].astype(np.float32))
        for first in range(0, n, BLOCK):
            index.add(self.passages[first:first + BLOCK].astype(np.float32))
        faiss.write_index(index, f"{path}.tmp")
        os.replace(f"{path}.tmp", path)

    def nearest(self, queries, without, depth, needy):
        """Return what `Exact.nearest` returns, as far as the index finds it."""
        k = min(len(self.passages), 4 * depth + max(map(len, without), default=0))
        _, numbers = self.index.search(queries.astype(np.float32), k)
        numbers = [np.setdiff1d(row, [*out, -1]) if need else row[:0].astype(np.int64)
                   for row, out, need in zip(numbers, without, needy)]
        pool = np.full((len(queries), depth), -1, dtype=np.int64)
        values = np.full(pool.shape, -np.inf, dtype=np.float32)
        for q, scores in enumerate(self.cosines(queries, numbers)):
            best = np.argsort(-scores, kind="stable")[:depth]
            pool[q, :len(best)], values[q, :len(best)] = numbers[q][best], scores[best]
        return pool, values


def _pairs(without):
    """Return (rows, numbers): all the passages that the queries of a chunk must not get."""
    rows = np.repeat(np.arange(len(without)), [len(numbers) for numbers in without])
    return rows, np.array([n for numbers in without for n in numbers], dtype=np.int64)


def top(scores, k):
    """Return the k best (values, columns) of each row of scores, best first, ties by lower column.

    >>> top(torch.tensor([[1., 3, 2, 3, 2]]), 3)[1]
    tensor([[1, 3, 2]])
    """
    values, columns = scores.topk(min(k, scores.shape[1]), dim=1)
    edge = values[:, -1:]
    tied = ((scores >= edge).sum(1) > values.shape[1]) & (edge[:, 0] > -torch.inf)
    for row in tied.nonzero()[:, 0].tolist():              # topk leaves open which one it takes
        above, level = (scores[row] > edge[row]).nonzero(), (scores[row] == edge[row]).nonzero()
        columns[row] = torch.cat([above, level])[:values.shape[1], 0]
        values[row] = scores[row, columns[row]]
    columns, order = columns.sort(1)
    values, order = values.gather(1, order).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


# ---------------------------------------------------------------- files that ranks fill together

def shared(path, shape, dtype, step, work, world=ALONE):
    """Return an array in a file that all ranks fill and map; parts that are done are noted.

    shape: (N, width). Part i, `work(i * step, end)`, is rank i % W's. Parts that are done are not
    filled again, so the path must say what the array is made of.
    """
    path, notes, dtype, n = Path(path), Path(f"{path}.done"), np.dtype(dtype), shape[0]
    n_parts, size = -(-n // step), int(np.prod(shape)) * dtype.itemsize

    def create():
        there = [p.stat().st_size if p.is_file() else None for p in (path, notes)]
        if there != [size, n_parts]:
            path.parent.mkdir(parents=True, exist_ok=True)
            notes.unlink(missing_ok=True)              # else a death here leaves zeros as done
            with open(path, "wb") as file:
                file.truncate(size)
            with atomic(notes, "wb") as file:
                file.write(bytes(n_parts))
        return notes.read_bytes()

    def fill():
        for i in range(world.rank, n_parts, world.size):
            if not done[i]:
                part = np.asarray(work(i * step, min((i + 1) * step, n)), dtype=dtype)
                write(path, i * step * part[0].nbytes, part.tobytes())
                write(notes, i, b"\1")

    def write(path, offset, values):
        with open(path, "r+b") as file:                    # a full disk is an OSError here, and
            file.seek(offset)                              # a SIGBUS through a map
            file.write(values)
            file.flush()
            os.fsync(file.fileno())

    done = world.on_main(create)
    together(world, fill)
    return np.memmap(path, dtype, "r", shape=shape) if n else np.empty(shape, dtype)


class Miner:
    """Mine the pools of some tasks, one after the other.

    folder: where the files go; all ranks must see it.
    """

    def __init__(self, folder, embedder, world=ALONE):
        self.folder, self.embedder, self.world = Path(folder), embedder, world

    def _embed(self, name, n, work):
        dim = self.embedder.dim
        dtype = np.float32 if n * dim * 4 <= LARGE else np.float16

        def checked(first, end):
            vectors = work(first, end)
            bad = np.flatnonzero(~np.isfinite(vectors).all(1))
            if bad.size:                           # it would be every query's hardest negative
                raise ValueError(f"{name}: the embedding of text number {first + bad[0]} is not "
                                 "finite")
            return vectors
        return shared(self.folder / name, (n, dim), dtype, TEXTS, checked, self.world)

    def passages(self, name, passages):
        """Return exact search over the embeddings of a `Passages`."""
        vectors = self._embed(f"{name}.passages", len(passages), lambda first, end:
                              self.embedder.encode([passages.text(i) for i in range(first, end)]))
        return Exact(vectors, self.embedder.device)

    def queries(self, name, rows, default):
        """Return the embeddings (Q, D) of the rows' queries, each under its own instruction."""
        def encode(first, end):
            part = [rows[q] for q in range(first, end)]
            prompts = [default if row["prompt"] is None else row["prompt"] for row in part]
            out = np.empty((len(part), self.embedder.dim), dtype=np.float32)
            for prompt in dict.fromkeys(prompts):
                chosen = [i for i, other in enumerate(prompts) if other == prompt]
                out[chosen] = self.embedder.encode([part[i]["query"] for i in chosen],
                                                   prompt=prompt)
            return out
        return self._embed(f"{name}.queries", len(rows), encode)

    def pools(self, name, passages, queries, search, sizes, *, keep=None, given=None):
        """Return (candidates, cosines), (Q, depth) int32 and float32 in a file.

        queries: (Q, D); None: the query of a row is its first positive. search: over the vectors of
        `passages`. sizes: (depth, n_given), see `mine`. keep: (candidates, cosines) -> candidates;
        the cosines no longer belong to these. given: row -> its given negatives; None: its own.
        """
        given = given or passages.negatives

        def work(first, end):
            known = [passages.positives(q) for q in range(first, end)]
            vectors = queries[first:end] if queries is not None else \
                search.passages[np.array([p[0] for p in known])]
            return mine(vectors, search, known, sizes[0],
                        given=[given(q) for q in range(first, end)], n_given=sizes[1])
        return self._units(name, len(passages.rows), sizes[0], work, keep)

    def of_rows(self, name, passages, depth, keep=None):
        """Return the same of rows that bring their negatives, in order, and their cosines."""
        def work(first, end):
            pool = np.full((end - first, depth), -1, dtype=np.int64)
            out = np.zeros((end - first, depth), dtype=np.float32)
            for i, q in enumerate(range(first, end)):
                numbers, cosines = passages.own(q, "neg").tolist(), passages.rows[q]["cosines"]
                score = dict(zip(numbers[::-1], cosines[::-1]))        # of equal texts the first
                best = passages.negatives(q)[:depth]
                pool[i, :len(best)], out[i, :len(best)] = best, [score[n] for n in best.tolist()]
            return pool, out
        return self._units(name, len(passages.rows), depth, work, keep)

    def _units(self, name, n, depth, work, keep):
        """Share `work` out in units of queries; their size depends on n alone."""
        def unit(first, end):
            pool, scores = work(first, end)
            pool = (keep(pool, scores) if keep else pool).astype(np.int32)
            return np.concatenate([pool, scores.view(np.int32)], axis=1)
        size = min(UNIT, CHUNK * max(1, -(-n // (64 * CHUNK))))
        out = shared(self.folder / f"{name}.pools", (n, 2 * depth), np.int32, size, unit,
                     self.world)
        return out[:, :depth], out[:, depth:].view(np.float32)

    def clear(self):
        """Remove the files; all ranks must call."""
        self.world.gather_objects(None)                    # each has mapped them by now
        self.world.on_main(self._remove)

    def _remove(self):
        for path in self.folder.glob("[!.]*"):             # the folder may be a link
            path.unlink()
        with contextlib.suppress(OSError):
            self.folder.rmdir()
