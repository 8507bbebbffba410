"""The distinct passages of some rows by number: tables on disk that all ranks build and map.

The text ids of all rows stand in their indices (engine/index.py), one place for each text. A
passage is numbered by the first place of its text. To find equal texts the ids are sorted in 64
buckets by their first bits; buckets are shared out among the ranks, so each holds a 64th at most.

    keys, firsts      each distinct id, in ascending order, and its first place
    queries, rows     the query ids of all rows, in ascending order, and their rows
    where             the first places in ascending order: passage p has its text at where[p]
"""
import hashlib
from functools import lru_cache

import numpy as np

from engine.distributed import ALONE
from engine.index import Job, build, read
from engine.jsonl import is_whole

BITS = 6                           # of an id that name its bucket: 64 buckets
SMALL = 1 << 20                    # texts that make one bucket
CHUNK = 1 << 22                    # ids that are looked at together


class Passages:
    """Every distinct passage of some rows by number; texts stay in the files.

    rows: `JsonlFiles` of rows {query, pos, neg} with their ids; the tables lie beside its indices.
    All ranks must call.
    """

    def __init__(self, rows, world=ALONE):
        self.rows, self.files = rows, rows.files
        self.starts = np.cumsum([0, *(len(file.ids) for file in self.files)])  # places of files
        made_of = hashlib.sha256(" ".join(file.index.stem for file in self.files).encode())
        path = self.files[0].index.with_name(made_of.hexdigest()[:24])
        self.bits = BITS if self.starts[-1] > SMALL else 0
        self.keys, self.firsts, self.query_ids, self.query_rows = self._table(
            path.with_name(f"{path.name}-equal.tab"), self._bucket, world)
        self.where, = self._table(path.with_name(f"{path.name}-where.tab"), self._firsts, world)
        self.answers = lru_cache(1000)(self._answers)      # thousands of rows may ask one question

    def _table(self, path, make, world):
        """Return the columns of a table, which is built first if it is missing or damaged."""
        if not world.on_main(lambda: is_whole(path)):
            build([Job(path, 1 << self.bits, lambda k: (make(k), None),
                       lambda parts: ([[0] * 4] * len(parts), {}))], world)
        return read(path)[1]

    def _bucket(self, k):
        """Return the four columns of bucket k."""
        ids, places = self._select([file.ids for file in self.files], self.starts, k)
        keys, first = np.unique(ids, return_index=True)
        return [keys, places[first], *self._select(
            [file.query_ids for file in self.files], self.rows.starts, k)]

    def _select(self, columns, starts, k):
        """Return the ids in bucket k in ascending order, and their places; ties by place."""
        ids, places = [], []
        for column, start in zip(columns, starts.tolist()):
            for first in range(0, len(column), CHUNK):
                part = np.asarray(column[first:first + CHUNK])
                here = np.flatnonzero(part >> 63 - self.bits == k)
                ids.append(part[here])
                places.append(here + (start + first))
        ids, places = np.concatenate(ids), np.concatenate(places)
        order = np.argsort(ids, kind="stable")
        return ids[order], places[order]

    def _firsts(self, k):
        """Return the first places that lie in the k-th part of all places, in order."""
        low, high = (int(self.starts[-1]) * i >> self.bits for i in (k, k + 1))
        parts = [self.firsts[i:i + CHUNK] for i in range(0, len(self.firsts), CHUNK)]
        return [np.sort(np.concatenate([p[(p >= low) & (p < high)] for p in parts]))]

    def __len__(self):
        return len(self.where)

    def numbers(self, ids):
        """Return the numbers of the passages with these text ids, int64."""
        return np.searchsorted(self.where, self.firsts[np.searchsorted(self.keys, ids)])

    def text(self, number):
        """Return the text of a passage."""
        place = int(self.where[number])
        f = int(np.searchsorted(self.starts, place, side="right")) - 1
        file, place = self.files[f], place - int(self.starts[f])
        i = int(np.searchsorted(file.first, place, side="right")) - 1
        row = file[i]
        return (row["pos"] + row["neg"])[place - int(file.first[i])]

    def _ids_of(self, q, part):
        """Return the text ids of the positives, or the negatives, of row q."""
        f, i = self.rows.place(q)
        file = self.files[f]
        first = int(file.first[i])
        end = int(file.first[i + 1]) if i + 1 < len(file) else len(file.ids)
        middle = first + int(file.n_pos[i])
        return file.ids[first:middle] if part == "pos" else file.ids[middle:end]

    def own(self, q, part):
        """Return the numbers of row q's own positives ("pos") or negatives, as they stand there."""
        return self.numbers(self._ids_of(q, part))

    def positive_ids(self, q):
        """Return the distinct ids of row q's positives, its own first, then those of its twins.

        Twins are the rows with the same query.
        """
        f, i = self.rows.place(q)
        key = self.files[f].query_ids[i]
        left, right = (int(np.searchsorted(self.query_ids, key, side)) for side in
                       ("left", "right"))
        twins = self.answers(left, right) if right - left > 1 else ()
        return list(dict.fromkeys([*self._ids_of(q, "pos").tolist(), *twins]))

    def _answers(self, left, right):
        """Return the distinct ids of the positives of some rows with one query, in their order."""
        return tuple(dict.fromkeys(np.concatenate(
            [self._ids_of(q, "pos") for q in self.query_rows[left:right].tolist()]).tolist()))

    def positives(self, q):
        """Return the numbers of the passages that answer row q, int64; its own first."""
        return self.numbers(self.positive_ids(q))

    def negatives(self, q):
        """Return the numbers of row q's own negatives, without its positives, each once."""
        known = set(self.positive_ids(q))
        return self.numbers([key for key in dict.fromkeys(self._ids_of(q, "neg").tolist())
                             if key not in known])
