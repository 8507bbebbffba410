"""Candidates for hard negatives: the distinct passages of some rows, and exact search over them.

Passages are numbered; their texts stay in the files. Rows are {query, pos, neg, prompt} of data.py.
"""
import hashlib
import unicodedata

import numpy as np
import torch


def text_id(text):
    """Hash a text to a non-negative int64; equal ids mean equal texts, composed or not (NFC)."""
    text = text if text.isascii() else unicodedata.normalize("NFC", text)
    digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Passages:
    """Every distinct passage of some rows by number; texts stay in the files.

    `positives[q]` lists the passage numbers that answer row q: its own, then those of rows with the
    same query. `given[q]` lists the negatives that its row carries. `ids[p]` is a text id.
    """

    def __init__(self, rows):
        self.rows, self.where, self.ids = rows, [], []
        self.positives, self.given = [], []
        self.number, same = {}, {}
        for q in range(len(rows)):
            row = rows[q]
            self.positives.append(self._add(row, q, "pos"))
            self.given.append(self._add(row, q, "neg"))
            same.setdefault(text_id(row["query"]), []).append(q)
        for group in same.values():
            shared = [p for q in group for p in self.positives[q]]
            for q in group:
                self.positives[q] = list(dict.fromkeys(self.positives[q] + shared))
                self.given[q] = [p for p in dict.fromkeys(self.given[q])
                                 if p not in self.positives[q]]

    def _add(self, row, q, part):
        numbers = []
        for place, text in enumerate(row[part]):
            key = text_id(text)
            if key not in self.number:
                self.number[key] = len(self.where)
                self.where.append((q, part, place))
                self.ids.append(key)
            numbers.append(self.number[key])
        return numbers

    def __len__(self):
        return len(self.where)

    def text(self, number):
        """Return the text of a passage."""
        q, part, place = self.where[number]
        return self.rows[q][part][place]


def mine(queries, passages, positives, depth=50, *, given=None, n_given=0, extra=None, chunk=256):
    """Return (candidates, scores), each (Q, depth): hard negatives of each query, hardest first.

    queries (Q, D), passages (P, D): normalised float32 embeddings. Candidates are int64 passage
    numbers padded with -1, scores float32 cosines. A query's `positives` are left out. Its `given`
    negatives come first; passages are searched for only if there are fewer than `n_given` of them.
    extra: (Q, X) further candidates (BM25's), ranked by the same cosine. Never holds Q x P scores.
    """
    pool = np.full((len(queries), depth), -1, dtype=np.int64)
    cosines = np.zeros((len(queries), depth), dtype=np.float32)
    k = min(len(passages), depth + max((len(p) for p in positives), default=0))
    embedded = torch.from_numpy(passages)
    for start in range(0, len(queries), chunk):
        scores = torch.from_numpy(queries[start:start + chunk]) @ embedded.T    # (chunk, P)
        nearest = scores.topk(k, dim=1).indices.numpy()
        for row, score in enumerate(scores.numpy()):
            q = start + row
            own = np.array(given[q] if given else [], dtype=np.int64)
            own = own[np.argsort(-score[own], kind="stable")]
            near = nearest[row] if len(own) < max(n_given, 1) else own[:0]
            if extra is not None and len(near):
                near = np.union1d(near, extra[q][extra[q] >= 0])
            near = near[~np.isin(near, [*positives[q], *own])]
            near = near[np.argsort(-score[near], kind="stable")]
            chosen = np.concatenate([own, near])[:depth]
            pool[q, :len(chosen)], cosines[q, :len(chosen)] = chosen, score[chosen]
    return pool, cosines
