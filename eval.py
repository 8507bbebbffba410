"""Score an embedder: metrics, MTEB's task types, MKQA's protocol, Figure 3 as numbers.

    python eval.py --checkpoint=out/embed_sup                     # the embedded documentation
    python eval.py --checkpoint=out/embed_sup --retrieval=DIR,DIR --sts=FILE --dims=64,128
    python eval.py --bm25 --retrieval=DIR                         # the baseline, by the same code
    python eval.py --sentence_transformer=NAME_OR_DIR --sts=FILE
    python eval.py --checkpoint=out/embed_sup --mteb="STS17,MTEB(eng, v2),MTEB(cmn, v1)"

It prints tables and writes one JSON object, {"<task>/<set>/<subset>/<metric>": number}; ":64" at
the end stands for the first 64 dimensions. Rows with `lang` are scored per language, retrieval per
pair of query and passage language, with the passages of that language as candidates.
PAPER Sec. 4: Tables 1, 2 and 5 are MTEB(eng, v2) and MTEB(cmn, v1); Table 14 is MTEB(eng, v1).
Protocols are mteb's; where a docstring says DEVIATES, not.
"""
import dataclasses
import functools
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from configurator import load_config
from data import PROMPTS, document_text, load_collection, parse_pair
from embed import Embedder
from engine import mteb_bridge
from engine.bm25 import BM25, split_words, top_k_of
from engine.jsonl import atomic, read_jsonl, read_texts
from engine.metrics import (accuracy, average_precision, f1, hit_at_k, mean_average_precision,
                            mrr_at_k, ndcg_at_k, recall_at_k, spearman, v_measure)
from engine.mteb_bridge import SentenceTransformerBaseline
from engine.splits import HELD_OUT, check_name, choose_split, groups_of, languages_in, set_name
from mask import effective_rank

DOCS = "out/installed_docs/test"   # the default collection, built by toy/
TOP_K = 1000                       # ranks that a search returns, as in mteb
SCORES_AT_ONCE = 2 ** 26           # of a search: 256 MB
PER_LANGUAGE = 1000                # texts of Figure 3, as in the paper


# ---------------------------------------------------------------- encoders
#
# An encoder has the `encode` of embed.Embedder, and may have its `prompts`. A stock model chooses
# its prompts by itself: see SentenceTransformerBaseline.

# These fall back on data.PROMPTS for an encoder without `prompts`.
prompt_of = functools.partial(mteb_bridge.prompt_of, default=PROMPTS)
MTEBModel = functools.partial(mteb_bridge.MTEBModel, prompts=PROMPTS)
evaluate_mteb = functools.partial(mteb_bridge.evaluate_mteb, prompts=PROMPTS)


class CachedEncoder:
    """Encode each text once per prompt, at full width, and serve every prefix of it from memory.

    The languages of one set share their English side, and `dims` share everything.
    """

    def __init__(self, encoder, batch_size=32):
        self.encoder, self.batch_size, self.tables = encoder, batch_size, {}
        self.prompt_of = functools.partial(prompt_of, encoder)

    def encode(self, texts, prompt=None, truncate_dim=None):
        """Return unit vectors (N, truncate_dim) float32; ValueError if one is not finite."""
        table = self.tables.setdefault(prompt, {})
        new = [text for text in dict.fromkeys(texts) if text not in table]
        if new:
            vectors = self.encoder.encode(new, batch_size=self.batch_size, prompt=prompt)
            bad = np.flatnonzero(~np.isfinite(vectors).all(1))
            if bad.size:
                raise ValueError(f"the embedding of {new[bad[0]][:80]!r} is not finite")
            table.update(zip(new, vectors))
        vectors = np.stack([table[text] for text in texts])
        if truncate_dim is None:
            return vectors
        if not 0 < truncate_dim <= vectors.shape[1]:
            raise ValueError(f"dims must be in 1..{vectors.shape[1]}, got {truncate_dim}")
        vectors = vectors[:, :truncate_dim]
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


class LexicalBaseline:
    """BM25 in an encoder's place: it ranks and compares texts, but has no vectors."""

    def encode(self, texts, **_):
        """Raise ValueError: there are no vectors."""
        raise ValueError("BM25 has no vectors: classification, clustering and Figure 3 need them")


def encode_sides(encoder, left, right, kind, dim=None):
    """Embed both sides of a task's texts, each with its prompt -> (N, D), (M, D)."""
    sides = ("query", "document") if kind in ("retrieval", "reranking") else (None, None)
    return [encoder.encode(texts, prompt=prompt_of(encoder, kind, side), truncate_dim=dim)
            for texts, side in zip((left, right), sides)]


def search(encoder, queries, documents, k, kind, dim=None):
    """Return the k best documents of each query by cosine: indices (Q, min(k, N)), best first.

    Equal scores go by lower index. BM25 finds only documents that share a word with the query; the
    ranks after those are -1.
    """
    if isinstance(encoder, LexicalBaseline):
        indices, scores = BM25(documents).top_k(queries, k)
        return np.where(scores > 0, indices, -1)
    number = {text: i for i, text in enumerate(dict.fromkeys(documents))}
    place = np.array([number[text] for text in documents])      # equal texts: one score, exactly
    left, right = encode_sides(encoder, queries, list(number), kind, dim)
    k, rows = min(k, len(documents)), max(1, SCORES_AT_ONCE // len(documents))
    indices = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), rows):
        scores = (left[start:start + rows] @ right.T)[:, place]         # (rows, N)
        indices[start:start + rows] = [top_k_of(row, k) for row in scores]
    return indices


def similarity(encoder, left, right, kind, dim=None):
    """Return the cosine of left[i] and right[i] as (N,) floats.

    BM25: the score of right[i], among all of `right`, for the query left[i].
    """
    if isinstance(encoder, LexicalBaseline):
        index = BM25(right)
        scores = functools.lru_cache(1)(index.scores)
        return np.array([scores(text)[i] for i, text in enumerate(left)])
    left, right = encode_sides(encoder, left, right, kind, dim)
    return (left * right).sum(1)


# ---------------------------------------------------------------- tasks: {metric: float}
#
# Rows are dicts as they stand in the files; `dim` scores the first dimensions alone.

def mean_of(scores):
    """Average dicts of metrics, key by key; there must be at least one."""
    scores = list(scores)
    return {metric: float(np.mean([s[metric] for s in scores])) for metric in scores[0]}


def retrieval(encoder, collection, dim=None):
    """Rank a collection's documents for each query that is judged.

    A query that is judged with zeros only counts 0. MAP is over the first 1,000 ranks. Of equal
    scores the larger id goes first, as in trec_eval.
    """
    queries = [row for row in collection.queries if collection.qrels.get(row["id"])]
    if not queries:
        raise ValueError("no query of the collection has a judged document in it")
    corpus = sorted(collection.corpus, key=lambda row: row["id"], reverse=True)
    position = {row["id"]: i for i, row in enumerate(corpus)}
    ranking = search(encoder, [row["text"] for row in queries],
                     [document_text(row) for row in corpus], TOP_K, "retrieval", dim)
    gains, judged = [], []
    for row, ranks in zip(queries, ranking):
        if collection.without_self:
            ranks = ranks[ranks != position.get(row["id"], -2)]
        gains.append(np.zeros(len(ranks)))
        for document, gain in collection.qrels[row["id"]].items():
            gains[-1][ranks == position.get(document, -2)] = gain
        judged.append(list(collection.qrels[row["id"]].values()))
    return {"ndcg@10": ndcg_at_k(gains, 10, judged),
            **{f"recall@{k}": recall_at_k(gains, k, judged) for k in (1, 10, 20, 100)},
            "map": mean_average_precision(gains, judged=judged),
            "mrr@10": mrr_at_k(gains, 10), "hit@1": hit_at_k(gains, 1)}


def retrieval_by_language(encoder, collection, subset="all", dim=None):
    """Score the mixed pool as `subset`, then each "query-passage" pair of languages, and means.

    The mixed pool also has the effective rank of its documents' embeddings.
    """
    results = {subset: retrieval(encoder, collection, dim)}
    if not isinstance(encoder, LexicalBaseline):
        texts = [document_text(row) for row in collection.corpus]
        results[subset] |= {"effective_rank": embedding_rank(encoder, texts, "retrieval", dim)}
    cells = {}
    for q in languages_in(collection.queries):
        for p in languages_in(collection.corpus):
            part = part_of(collection, q, p)
            if any(part.qrels.get(row["id"]) for row in part.queries):
                cells[q, p] = retrieval(encoder, part, dim)
    if len(cells) > 1:
        results |= {f"{q}-{p}": cell for (q, p), cell in cells.items()}
        results["mean"] = mean_of(cells.values())
        same = [cell for (q, p), cell in cells.items() if q == p]
        cross = [cell for (q, p), cell in cells.items() if q != p]
        if same and cross:
            results |= {"mean_same": mean_of(same), "mean_cross": mean_of(cross)}
    return results


def part_of(collection, query_language, passage_language):
    """Restrict a collection to the queries of one language and the documents of one.

    A query whose relevant documents are all in other languages is not judged in this part.
    """
    corpus = [row for row in collection.corpus if row.get("lang") == passage_language]
    ids, qrels = {row["id"] for row in corpus}, {}
    for query, judged in collection.qrels.items():
        here = {document: gain for document, gain in judged.items() if document in ids}
        if max(here.values(), default=0) > 0 or max(judged.values(), default=0) <= 0:
            qrels[query] = here
    queries = [row for row in collection.queries if row.get("lang") == query_language]
    return dataclasses.replace(collection, queries=queries, corpus=corpus, qrels=qrels)


def embedding_rank(encoder, texts, kind, dim=None, most=1000):
    """Return the effective rank of texts' embeddings, in [1, D]; near 1 they have collapsed.

    PAPER Sec. 4.6.2 speaks of representation collapse. A seeded sample of `most` texts is taken.
    """
    chosen = np.random.default_rng(0).permutation(len(texts))[:most]
    side = "document" if kind == "retrieval" else None
    vectors = encoder.encode([texts[i] for i in chosen], prompt=prompt_of(encoder, kind, side),
                             truncate_dim=dim)
    return effective_rank(torch.as_tensor(vectors))


def mkqa(encoder, collection, dim=None, passage_language="en"):
    """Score queries of each language against the English passages (PAPER Tables 3 and 13).

    Where queries have `answers`, a passage is relevant if it has the words of one in a row, as in
    MKQA's protocol; else if the qrels say so. Passages without any `lang` are English. "mean" is
    over the languages other than English: the paper's 25, with three of Chinese.
    """
    if not languages_in(collection.corpus):
        corpus = [{**row, "lang": passage_language} for row in collection.corpus]
        collection = dataclasses.replace(collection, corpus=corpus)
    results = {}
    for language in languages_in(collection.queries):
        part = part_of(collection, language, passage_language)
        if any(row.get("answers") for row in part.queries):
            results[language] = answer_retrieval(encoder, part, dim)
        elif any(part.qrels.get(row["id"]) for row in part.queries):
            scores = retrieval(encoder, part, dim)
            results[language] = {m: scores[m] for m in ("recall@20", "recall@100", "ndcg@10")}
    foreign = [scores for language, scores in results.items() if language != passage_language]
    if not foreign:
        raise ValueError("mkqa needs `lang` in both files, and queries in more than English")
    return results | {"mean": mean_of(foreign)}


def answer_retrieval(encoder, collection, dim=None):
    """Score queries by the strings of their `answers`; those without any are left out.

    recall@k is the share of queries with an answer among the first k passages. UNSPECIFIED: the
    paper's nDCG@10; here the best order is that of the first 100 passages.
    """
    queries = [row for row in collection.queries if row.get("answers")]
    documents = [document_text(row) for row in collection.corpus]
    ranking = search(encoder, [row["text"] for row in queries], documents, 100, "retrieval", dim)
    words = functools.cache(lambda i: f" {' '.join(split_words(documents[i]))} ")
    gains = []
    for row, ranks in zip(queries, ranking):
        answers = [f" {' '.join(split_words(answer))} " for answer in row["answers"]]
        gains.append([any(answer in words(i) for answer in answers if answer.strip())
                      for i in ranks.tolist() if i >= 0])
    return {"recall@20": hit_at_k(gains, 20), "recall@100": hit_at_k(gains, 100),
            "ndcg@10": ndcg_at_k(gains, 10)}


def bitext_mining(encoder, rows, dim=None):
    """Find each sentence's translation among all of the group's, query -> pos and back.

    Positions count, as in MTEB: an equal sentence elsewhere in the group is a mistake.
    """
    results, order = {}, np.arange(len(rows))
    queries, passages = [row["query"] for row in rows], [row["pos"] for row in rows]
    for left, right, suffix in ((queries, passages, ""), (passages, queries, "_reverse")):
        best = search(encoder, left, right, 1, "bitext", dim)[:, 0]
        results["accuracy" + suffix] = accuracy(order, best)
        results["f1" + suffix] = f1(order, best, average="weighted")
    return results


def sts(encoder, rows, dim=None):
    """Correlate the cosine of sentence1 and sentence2 with `score`, by rank."""
    cosine = similarity(encoder, *_sentences(rows), "sts", dim)
    return {"spearman": spearman([row["score"] for row in rows], cosine)}


def pair_classification(encoder, rows, dim=None):
    """Rank pairs by similarity; average precision of `label` 1 (`max_ap` also tries Manhattan).

    Of unit vectors, dot product and Euclidean distance rank pairs exactly as the cosine does.
    """
    labels = [row["label"] for row in rows]
    if set(labels) - {0, 1}:
        raise ValueError(f"pair labels must be 0 or 1, got {sorted(set(labels), key=str)[:5]}")
    ap = average_precision(labels, similarity(encoder, *_sentences(rows), "pair_classification",
                                              dim))
    if isinstance(encoder, LexicalBaseline):
        return {"ap": ap, "max_ap": ap}
    left, right = encode_sides(encoder, *_sentences(rows), "pair_classification", dim)
    return {"ap": ap, "max_ap": max(ap, average_precision(labels, -np.abs(left - right).sum(1)))}


def _sentences(rows):
    return [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]


def reranking(encoder, rows, dim=None):
    """Rank each query's own pos and neg; rows that lack either are left out, as in MTEB."""
    rows = [row for row in rows if row["pos"] and row["neg"]]
    # Negatives first: the lower index wins a tie, and a tie must not count as a success.
    candidates = [(*row["neg"], *row["pos"]) for row in rows]
    queries = [row["query"] for row, texts in zip(rows, candidates) for _ in texts]
    documents = [text for texts in candidates for text in texts]
    scores = similarity(encoder, queries, documents, "reranking", dim)
    ends = np.cumsum([len(texts) for texts in candidates])
    gains = [np.argsort(-part, kind="stable") >= len(row["neg"])
             for row, part in zip(rows, np.split(scores, ends[:-1]))]
    return {"map": mean_average_precision(gains), "mrr@10": mrr_at_k(gains, 10),
            "ndcg@10": ndcg_at_k(gains, 10)}


def _learn():
    """Return scikit-learn's logistic regression and k-means."""
    try:
        from sklearn.cluster import MiniBatchKMeans
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise ImportError("classification, clustering and figure3 need: pip install scikit-learn"
                          ) from None
    return LogisticRegression, MiniBatchKMeans


def classification(encoder, rows, dim=None, n_experiments=10, per_label=8, seed=42):
    """Fit logistic regression on a few rows of each label with split "train", score the others.

    The mean of `n_experiments` draws, which are the very ones of mteb.
    """
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] != "train"]
    if not train or not test:
        raise ValueError(f"classification got {len(train)} rows to fit and {len(test)} to score")
    prompt, (regression, _) = prompt_of(encoder, "classification"), _learn()
    labels = np.array([str(row["label"]) for row in train])
    gold = np.array([str(row["label"]) for row in test])
    vectors = encoder.encode([row["text"] for row in test], prompt=prompt, truncate_dim=dim)
    scores, order = [], np.arange(len(train))
    for _ in range(n_experiments):
        np.random.RandomState(seed).shuffle(order)     # one seed, but the order before it differs
        count, chosen = Counter(), []
        for i in order.tolist():
            count[labels[i]] += 1
            if count[labels[i]] <= per_label:
                chosen.append(i)
        few = encoder.encode([train[i]["text"] for i in chosen], prompt=prompt, truncate_dim=dim)
        if len(set(labels[chosen])) == 1:
            guess = np.full(len(gold), labels[chosen[0]])
        else:
            guess = regression(max_iter=100, random_state=seed).fit(few, labels[chosen]).predict(
                vectors)
        scores.append({"accuracy": accuracy(gold, guess), "f1": f1(gold, guess)})
    return mean_of(scores)


def clustering(encoder, rows, dim=None, n_experiments=10, sample=16_384, seed=42):
    """Cluster samples of the rows into as many groups as labels: V-measure, averaged.

    The draws, with replacement, are mteb's for a set that it embeds whole.
    """
    vectors = encoder.encode([row["text"] for row in rows], prompt=prompt_of(encoder, "clustering"),
                             truncate_dim=dim)
    labels, draw, (_, k_means) = np.array([str(row["label"]) for row in rows]), \
        random.Random(seed), _learn()
    model = k_means(len(set(labels)), batch_size=512, n_init=1, random_state=seed)
    scores = []
    for _ in range(n_experiments):
        chosen = draw.choices(range(len(rows)), k=sample)
        scores.append({"v_measure": v_measure(labels[chosen], model.fit_predict(vectors[chosen]))})
    return mean_of(scores)


def sample_languages(rows, most=PER_LANGUAGE, seed=0):
    """Draw up to `most` rows of each language -> (texts, codes (N,), languages)."""
    languages, draw = languages_in(rows), np.random.default_rng(seed)
    if len(languages) < 2:
        raise ValueError(f"Figure 3 needs texts with `lang` in two languages, got {languages}")
    texts, codes = [], []
    for code, language in enumerate(languages):
        own = [row["text"] for row in rows if row["lang"] == language]
        own = [own[i] for i in draw.permutation(len(own))[:most]]
        texts, codes = texts + own, codes + [code] * len(own)
    return texts, np.array(codes), languages


def language_separation(encoder, rows, dim=None, seed=0):
    """Measure how far languages lie apart: PAPER Figure 3 as numbers, 1,000 texts of each.

    language_accuracy: a linear probe, fitted on half of each language's texts, names the language
    of the other half (1: separate clusters; near `chance`: one distribution). centroid_distance:
    mean over pairs of languages. spread: root mean squared distance of texts to their centroid.
    """
    texts, codes, languages = sample_languages(rows, seed=seed)
    vectors = encoder.encode(texts, prompt=None, truncate_dim=dim)
    order = np.random.default_rng(seed).permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]      # shuffled within each language
    fit, rest = order[::2], order[1::2]
    probe = _learn()[0](max_iter=1000).fit(vectors[fit], codes[fit])
    centers = np.stack([vectors[codes == code].mean(0) for code in range(len(languages))])
    distance = np.linalg.norm(centers[:, None] - centers, axis=2)
    return {"language_accuracy": accuracy(codes[rest], probe.predict(vectors[rest])),
            "chance": float(np.bincount(codes[rest]).max() / len(rest)),
            "centroid_distance": float(distance[np.triu_indices(len(languages), 1)].mean()),
            "spread": float(np.sqrt(((vectors - centers[codes]) ** 2).sum(1).mean())),
            "effective_rank": effective_rank(torch.as_tensor(vectors))}


# ---------------------------------------------------------------- files and splits

TEXTS = (str, list)
ROW_TASKS = {                      # the tasks of one file: a function, and what a row must have
    "bitext": (bitext_mining, {}),                     # two forms, see `bitext_groups`
    "sts": (sts, {"sentence1": str, "sentence2": str, "score": (int, float)}),
    "pair_classification": (pair_classification, {"sentence1": str, "sentence2": str,
                                                  "label": int}),
    "reranking": (reranking, {"query": str, "pos": TEXTS, "neg": TEXTS}),
    "classification": (classification, {"text": str, "label": (str, int), "split": str}),
    "clustering": (clustering, {"text": str, "label": (str, int)}),
    "figure3": (language_separation, {"text": str, "lang": str}),
}
def read_rows(task, path):
    """Return the rows of a file for a task; each error names file and line."""
    rows = []
    for number, row in enumerate(read_jsonl(path, ROW_TASKS[task][1]), 1):
        try:
            if task == "bitext" and "query" in row or task == "reranking" and row["pos"]:
                row |= parse_pair(row)                 # a string and a list of one are the same
            for key in ("lang", "lang_q", "lang_p", "split"):
                check_name(key, row.get(key))
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: no rows")
    return rows


def evaluate(encoder, task, path, split=None, dims=(), **reading):
    """Score one file or collection -> {"<task>/<set>/<subset>/<metric>[:dim]": float}.

    reading: `dangling` and `ignore_identical_ids` of data.load_collection.
    Raises ValueError for a malformed file, a split or language that is not there, a dim too large.
    """
    if not isinstance(encoder, (LexicalBaseline, CachedEncoder)):
        encoder = CachedEncoder(encoder)
    if task in ROW_TASKS:
        rows, subset = choose_split(read_rows(task, path), split, path, task == "classification")
        groups, function = groups_of(task, rows, subset, path), ROW_TASKS[task][0]
    else:
        collection = load_collection(path, split, **reading)
        queries, subset = (collection.queries, collection.split) if collection.split else \
            choose_split(collection.queries, split, path)
        subset = Path(path).name if Path(path).name in HELD_OUT else subset
        collection = dataclasses.replace(collection, queries=queries)
        for lang in languages_in(collection.queries + collection.corpus):
            check_name(f"{path}: lang", lang)
    results = {}
    for dim in (None, *dims):
        if task == "retrieval":
            scores = retrieval_by_language(encoder, collection, subset, dim)
        elif task == "mkqa":
            scores = mkqa(encoder, collection, dim)
        else:
            scores = {name: function(encoder, group, dim) for name, group in groups.items()}
            scores |= {"mean": mean_of(scores.values())} if len(scores) > 1 else {}
        for group, metrics in scores.items():
            for metric, value in metrics.items():
                cut = "" if dim is None else f":{dim}"
                results[f"{task}/{set_name(path)}/{group}/{metric}{cut}"] = value
    return results


def evaluate_collection(encoder, directory, dims=()):
    """Score a retrieval collection -> the flat dict that `train.py` logs after each stage."""
    return evaluate(encoder, "retrieval", directory, dims=dims)


def timing(encoder, path, batch_size=32):
    """Measure the seconds that a file's queries take to encode (PAPER Table 5), after a warm-up."""
    texts, prompt = read_texts(path), prompt_of(encoder, "retrieval", "query")
    encoder.encode(texts[:batch_size], batch_size=batch_size, prompt=prompt)
    start = time.perf_counter()
    encoder.encode(texts, batch_size=batch_size, prompt=prompt)
    where = f"timing/{set_name(path)}/all"
    return {f"{where}/seconds": time.perf_counter() - start, f"{where}/texts": len(texts)}


# ---------------------------------------------------------------- the command line

@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """Which model, which sets, and where the scores go."""
    checkpoint: str = ""               # the model: a folder that train.py or tools/export.py wrote
    sentence_transformer: str = ""     # or: a sentence-transformers name or folder
    bm25: bool = False                 # or: BM25, for the tasks that need no vectors
    retrieval: tuple[str, ...] = ()    # collections: corpus.jsonl, queries.jsonl, qrels (BEIR)
    mkqa: tuple[str, ...] = ()         # collections: queries in many languages, English passages
    bitext: tuple[str, ...] = ()       # {query, pos, lang_q, lang_p} or {id, lang, text}
    sts: tuple[str, ...] = ()          # {sentence1, sentence2, score}
    pair_classification: tuple[str, ...] = ()  # {sentence1, sentence2, label: 0 or 1}
    reranking: tuple[str, ...] = ()    # {query, pos: [...], neg: [...]}
    classification: tuple[str, ...] = ()   # {text, label, split}
    clustering: tuple[str, ...] = ()   # {text, label}
    figure3: tuple[str, ...] = ()      # {text, lang}
    mteb: tuple[str, ...] = ()         # mteb's tasks or benchmarks by name; data is downloaded
    timing_texts: str = ""             # a file of queries: the seconds that they take to encode
    split: str | None = None           # none: test, else dev, else validation, else all rows
    dangling: Literal["refuse", "skip", "count"] = "refuse"    # qrels that name a missing text
    ignore_identical_ids: bool | None = None   # a query's own document; none: if texts are equal
    dims: tuple[int, ...] = ()         # also score these first dimensions (MRL)
    batch_size: int = 32               # texts per forward pass
    out: str = ""                      # JSON file to write (empty: add to the run's eval.json)

    def __post_init__(self):
        if sum(map(bool, (self.checkpoint, self.sentence_transformer, self.bm25))) != 1:
            raise ValueError("give one of --checkpoint, --sentence_transformer and --bm25")
        if self.bm25 and (self.dims or self.mteb or self.timing_texts):
            raise ValueError(f"BM25 has no vectors: dims={self.dims}, mteb={self.mteb}, "
                             f"timing_texts={self.timing_texts!r}")

    @property
    def name(self):
        """A short name of the model."""
        return Path(self.checkpoint or self.sentence_transformer or "bm25").name

    @property
    def place(self):
        """The JSON file: one for each model, so that no two models' scores mix.

        A run has eval.json, which train.py begins; one checkpoint and a baseline have their own.
        """
        path = Path(self.checkpoint)
        if self.out or not self.checkpoint:
            return Path(self.out or f"out/eval_{self.name}.json")
        one = (path / "manifest.json").is_file()
        return path.with_name(f"eval_{path.name}.json") if one else path / "eval.json"


def join_names(parts):
    """Undo the command line's split at commas that belong to a path or to a name in brackets.

    >>> join_names(("STS17", "MTEB(eng", "v2)"))
    ['STS17', 'MTEB(eng, v2)']
    """
    parts, names = list(parts), []
    while parts:
        for n in range(len(parts), 0, -1):
            whole = [comma.join(parts[:n]) for comma in (",", ", ")]
            name = next((name for name in whole if Path(name).exists()), whole[1])
            bracketed = name.count("(") == name.count(")") == 1 and name.endswith(")")
            if n == 1 or Path(name).exists() or bracketed and "(" in parts[0]:
                break
        names, parts = [*names, name], parts[n:]
    return names


def table(results):
    """Format flat results as text: one block per task and set, a row per subset."""
    blocks = {}
    for key, value in results.items():
        task, name, subset, metric = key.split("/")
        metric, _, dim = metric.partition(":")
        row = f"{subset}, {dim} dims" if dim else subset
        blocks.setdefault(f"{task}/{name}", {}).setdefault(row, {})[metric] = value
    lines = []
    for title, rows in blocks.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        width = max(map(len, [title, *rows]))
        lines += ["", "  ".join([title.ljust(width), *metrics])]
        for subset, row in rows.items():
            cells = [f"{row[m]:.4f}".rjust(len(m)) if m in row else " " * len(m) for m in metrics]
            lines.append("  ".join([subset.ljust(width), *cells]))
    return "\n".join(lines)


def load_encoder(config):
    """Return what the options name: an Embedder or one of the two baselines."""
    if config.bm25:
        return LexicalBaseline()
    if config.sentence_transformer:
        return SentenceTransformerBaseline(config.sentence_transformer)
    return Embedder(config.checkpoint)


def earlier(config):
    """Return the scores that stay: those of the file, unless --out has named it."""
    if config.out or not config.place.is_file():
        return {}
    try:
        return dict(json.loads(config.place.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{config.place}: not a JSON object, delete it or give --out: {error}"
                         ) from None


def score(encoder, task, name, config):
    """Return the flat results of one job of the command line."""
    if task == "mteb":
        return evaluate_mteb(encoder, name, config.place.parent / "mteb", config.dims,
                             config.batch_size)
    if task == "timing":
        return timing(encoder, name, config.batch_size)
    cached = encoder if config.bm25 else CachedEncoder(encoder, config.batch_size)
    reading = {} if task in ROW_TASKS else {
        "dangling": config.dangling, "ignore_identical_ids": config.ignore_identical_ids}
    return evaluate(cached, task, name, config.split, config.dims, **reading)


def run(config):
    """Score every set of the config, print the tables; the JSON file is written after each set."""
    encoder, results = load_encoder(config), {}
    before = earlier(config)                           # raises before hours of scoring
    jobs = [(task, name) for task in ("retrieval", "mkqa", *ROW_TASKS, "mteb")
            for name in join_names(getattr(config, task))]
    jobs += [("timing", config.timing_texts)] if config.timing_texts else []
    if not config.bm25:
        results[f"model/{config.name}/all/parameters"] = sum(
            p.numel() for p in encoder.model.parameters())
    for task, name in jobs or [("retrieval", DOCS)]:
        start = time.perf_counter()
        scores = score(encoder, task, name, config)
        if task != "mteb" and (twice := results.keys() & scores.keys()):
            raise ValueError(f"{name}: another set gave {min(twice)!r} already; rename its folder")
        results |= scores
        with atomic(config.place) as file:
            file.write(json.dumps(before | results, indent=1, ensure_ascii=False) + "\n")
        print(f"{table(scores)}\n({name}: {time.perf_counter() - start:.1f} s)", flush=True)
    added = f", beside {len(before.keys() - results.keys())} earlier numbers" if before else ""
    print(f"\nwrote {config.place}{added}")


def main():
    """Score what the command line names."""
    config = load_config(EvalConfig)
    try:
        run(config)
    except (ValueError, OSError, ImportError) as error:
        sys.exit(f"eval.py: error: {error}")


if __name__ == "__main__":
    main()
