"""The metrics of MTEB and MKQA as plain functions: numpy in, float out.

gains[q, r] is the relevance of the document at rank r of query q, best rank first; lists of
different lengths may be given. judged[q] lists the relevances of all documents judged for q, ranked
or not (None: `gains` holds them all). The result is the mean over queries; a query without a
relevant document counts 0, and no query at all gives 0.0.

Definitions are trec_eval's (as mteb calls it), scipy's and scikit-learn's, to which the tests
compare. Where those give nan (a constant input to a correlation) the value here is 0.0.
"""
import numpy as np


def ndcg_at_k(gains, k=10, judged=None):
    """Average the discounted gain of the first k ranks over the best possible one, in [0, 1].

    DCG = sum of gain / log2(rank + 1), ranks from 1.

    >>> round(ndcg_at_k([0, 1, 0]), 4)      # the one relevant document at rank 2: 1 / log2(3)
    0.6309
    """
    gains, judged = _gains_and_judged(gains, judged)
    return _mean(_ratio(_dcg(gains, k), _dcg(-np.sort(-judged, axis=1), k)))


def recall_at_k(gains, k=10, judged=None):
    """Average the share of a query's relevant documents among the first k, in [0, 1].

    >>> recall_at_k([0, 1, 0], k=2, judged=[1, 1])      # one of two
    0.5
    """
    gains, judged = _gains_and_judged(gains, judged)
    return _mean(_ratio((gains[:, :k] > 0).sum(1), (judged > 0).sum(1)))


def hit_at_k(gains, k=1):
    """Average over queries whether any of the first k is relevant, in [0, 1].

    >>> hit_at_k([[0, 1, 0], [0, 0, 1]], k=2)
    0.5
    """
    return _mean((_matrix(gains)[:, :k] > 0).any(1))


def mrr_at_k(gains, k=10):
    """Average 1 / (rank of the first relevant document), 0 beyond rank k, in [0, 1].

    >>> mrr_at_k([[0, 1, 0], [0, 0, 1]], k=2)      # 1/2 and 0
    0.25
    """
    hits = _matrix(gains)[:, :k] > 0
    first = hits.argmax(1) if hits.size else np.zeros(len(hits))
    return _mean(hits.any(1) / (first + 1))


def mean_average_precision(gains, judged=None):
    """Average the precision at each relevant document's rank (MAP), in [0, 1].

    Documents beyond the list's end have precision 0 and stay in the divisor.

    >>> round(mean_average_precision([1, 0, 1]), 4)      # (1/1 + 2/3) / 2
    0.8333
    """
    gains, judged = _gains_and_judged(gains, judged)
    hits = gains > 0
    precision = hits.cumsum(1) / np.arange(1, hits.shape[1] + 1)
    return _mean(_ratio((precision * hits).sum(1), (judged > 0).sum(1)))


def average_precision(labels, scores):
    """Return the area under precision over recall of (N,) binary labels, in [0, 1].

    Pairs of equal score are one step: their order cannot matter. 0.0 without positives.

    >>> round(average_precision([1, 0, 1], [0.9, 0.5, 0.1]), 4)      # (1/1 + 2/3) / 2
    0.8333
    """
    labels, scores = _two(labels, _finite(scores))
    order = np.argsort(-scores, kind="stable")
    labels, scores = labels[order].astype(bool), scores[order]
    if not labels.any():
        return 0.0
    last = np.append(scores[1:] != scores[:-1], True)  # the end of each group of ties
    hits = labels.cumsum()[last]
    precision = hits / (np.flatnonzero(last) + 1)
    return float((np.diff(hits, prepend=0) * precision).sum() / labels.sum())


def spearman(x, y):
    """Correlate the ranks of two (N,) arrays, ties sharing their mean rank, in [-1, 1].

    0.0 if either is constant or N < 2.

    >>> round(spearman([1, 2, 3], [10, 30, 20]), 4)      # 1 - 6 * (0 + 1 + 1) / (3 * 8)
    0.5
    """
    x, y = _two(_finite(x), _finite(y))
    x, y = (_mean_ranks(side) - (len(side) + 1) / 2 for side in (x, y))
    norm = np.sqrt((x * x).sum() * (y * y).sum())
    return float((x * y).sum() / norm) if norm > 0 else 0.0


def _dcg(gains, k):
    gains = np.maximum(gains[:, :k], 0)
    return (gains / np.log2(np.arange(2, gains.shape[1] + 2))).sum(1)


def _ratio(a, b):
    return np.divide(a, b, out=np.zeros(len(a)), where=b > 0)


def _mean(values):
    return float(np.mean(values)) if len(values) else 0.0


def _mean_ranks(x):
    _, group, size = np.unique(x, return_inverse=True, return_counts=True)
    return (size.cumsum() - (size - 1) / 2)[group]


def _matrix(rows):
    """Turn one list of relevances, or one per query, into a (Q, R) array padded with zeros."""
    rows = list(rows)
    if rows and np.ndim(rows[0]) == 0:
        rows = [rows]
    matrix = np.zeros((len(rows), max(map(len, rows), default=0)))
    for target, row in zip(matrix, rows):
        target[:len(row)] = row
    return matrix


def _gains_and_judged(gains, judged):
    gains = _matrix(gains)
    judged = gains if judged is None else _matrix(judged)
    if len(gains) != len(judged):
        raise ValueError(f"gains has {len(gains)} queries, judged has {len(judged)}")
    return gains, judged


def _finite(x):
    x = np.asarray(x, dtype=np.float64)
    if not np.isfinite(x).all():
        raise ValueError(f"{np.count_nonzero(~np.isfinite(x))} of {x.size} scores are not finite")
    return x


def _two(a, b):
    a, b = np.asarray(a), np.asarray(b)
    if a.ndim != 1 or a.shape != b.shape:
        raise ValueError(f"expected two arrays of one shape (N,), got {a.shape} and {b.shape}")
    return a, b
