"""The tasks of MTEB and Figure 3 of the paper: an encoder and rows in, {metric: float} out.

Any object serves as the encoder that has the `encode` of `embed.Embedder`,

    encode(texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True) -> (N, D) float32

Rows are dicts as they stand in the files (columns: `eval.ROWS`); `dim` scores the first dimensions
alone. Queries of retrieval and reranking get the retrieval prompt and their documents none; both
sides of the symmetric tasks get the prompt of their task, if `data.PROMPTS` has one.
The protocols are those of mteb 2; where a docstring says DEVIATES, not.
"""

from collections import Counter

import numpy as np
import torch

from engine.bm25 import BM25, top_k_of
from data import PROMPTS
from metrics import (
    accuracy,
    average_precision,
    f1,
    hit_at_k,
    mean_average_precision,
    mrr_at_k,
    ndcg_at_k,
    recall_at_k,
    spearman,
    v_measure,
)

TOP_K = 1000  # ranks that a search returns, as in mteb
SCORES_AT_ONCE = 2**26  # of a search: 256 MB
PER_LANGUAGE = 1000  # texts of Figure 3, as in the paper


# ---------------------------------------------------------------- who is scored


class CachedEncoder:
    """Encode each text once per prompt, at full width, and serve every prefix of it from memory.

    The languages of one set share their English side, and `dims` share everything.
    """

    def __init__(self, encoder, batch_size=32):
        self.encoder, self.batch_size, self.tables = encoder, batch_size, {}

    def encode(self, texts, prompt=None, truncate_dim=None):
        """Return unit vectors (N, truncate_dim) float32; ValueError if one is not finite."""
        table = self.tables.setdefault(prompt, {})
        new = [text for text in dict.fromkeys(texts) if text not in table]
        if new:
            vectors = self.encoder.encode(
                new, batch_size=self.batch_size, prompt=prompt, truncate_dim=None, normalize=True
            )
            bad = np.flatnonzero(~np.isfinite(vectors).all(1))
            if bad.size:
                raise ValueError(f"the embedding of {new[bad[0]][:80]!r} is not finite")
            table.update(zip(new, vectors))
        vectors = np.stack([table[text] for text in texts])
        if truncate_dim is not None:
            if not 0 < truncate_dim <= vectors.shape[1]:
                raise ValueError(f"dims must be in 1..{vectors.shape[1]}, got {truncate_dim}")
            vectors = vectors[:, :truncate_dim]
            norm = np.linalg.norm(vectors, axis=1, keepdims=True)
            vectors = vectors / np.maximum(norm, 1e-12)
        return vectors


class LexicalBaseline:
    """BM25 in an encoder's place: it ranks and compares texts, but has no vectors."""

    def encode(self, texts, prompt=None, truncate_dim=None):
        """Raise ValueError: there are no vectors."""
        raise ValueError("BM25 has no vectors: classification, clustering and Figure 3 need them")


class SentenceTransformerBaseline:
    """A sentence-transformers model; it applies its own prompts, to retrieval's two sides."""

    def __init__(self, name):
        try:
            from sentence_transformers import SentenceTransformer
        except ImportError as error:
            message = "--sentence_transformer needs: pip install sentence-transformers>=5"
            raise ImportError(message) from error
        self.model = SentenceTransformer(name)

    def encode(self, texts, batch_size=32, prompt=None, truncate_dim=None, normalize=True):
        """Embed texts as `Embedder.encode` does; the retrieval prompt marks queries."""
        model, is_query = self.model, prompt == PROMPTS["retrieval"]
        encode = model.encode_query if is_query else model.encode_document
        return encode(
            texts, batch_size=batch_size, truncate_dim=truncate_dim, normalize_embeddings=normalize
        )


def search(encoder, queries, documents, k, *, prompts=(None, None), dim=None):
    """Find the k best documents of each query by cosine -> indices (Q, min(k, N)), best first.

    Equal scores go by lower index. BM25 finds only documents that share a word with the query;
    the ranks after those are -1.
    """
    if isinstance(encoder, LexicalBaseline):
        found, scores = BM25(documents).top_k(queries, k)
        return np.where(scores > 0, found, -1)
    queries = encoder.encode(queries, prompt=prompts[0], truncate_dim=dim)  # (Q, D)
    documents = encoder.encode(documents, prompt=prompts[1], truncate_dim=dim)  # (N, D)
    k, rows = min(k, len(documents)), max(1, SCORES_AT_ONCE // len(documents))
    found = np.empty((len(queries), k), dtype=np.int64)
    for start in range(0, len(queries), rows):
        scores = queries[start : start + rows] @ documents.T  # (rows, N)
        found[start : start + rows] = [top_k_of(row, k) for row in scores]
    return found


def similarity(encoder, left, right, *, prompts=(None, None), dim=None):
    """Compare left[i] with right[i] by cosine -> (N,) float.

    BM25: the score of right[i], among all of `right`, for the query left[i].
    """
    if isinstance(encoder, LexicalBaseline):
        index, scores, last = BM25(right), np.zeros(len(left)), None
        for i, text in enumerate(left):
            if text != last:
                last, row = text, index.scores(text)
            scores[i] = row[i]
        return scores
    left = encoder.encode(left, prompt=prompts[0], truncate_dim=dim)
    right = encoder.encode(right, prompt=prompts[1], truncate_dim=dim)
    return (left * right).sum(1)


# ---------------------------------------------------------------- the tasks


def languages_in(rows):
    """Return the sorted `lang` values of rows; rows without one do not count."""
    return sorted({row["lang"] for row in rows if row.get("lang")})


def judged_queries(collection):
    """Return the texts of queries with a relevant document, and {document's row: gain} of each."""
    position = {row["id"]: i for i, row in enumerate(collection.corpus)}
    queries, relevant = [], []
    for row in collection.queries:
        judged = collection.qrels.get(row["id"], {}).items()
        gains = {position[doc]: gain for doc, gain in judged if gain > 0 and doc in position}
        if gains:
            queries.append(row["text"])
            relevant.append(gains)
    return queries, relevant


def mean_of(scores):
    """Average dicts of metrics, key by key; there must be at least one."""
    scores = list(scores)
    return {metric: float(np.mean([s[metric] for s in scores])) for metric in scores[0]}


def retrieval(encoder, collection, dim=None):
    """Rank a collection's documents for each query that has a relevant one among them.

    A document is its title and its text. MAP is over the first 1,000 ranks, as in mteb.
    """
    queries, relevant = judged_queries(collection)
    if not queries:
        raise ValueError("no query of the collection has a relevant document in it")
    documents = [f"{row.get('title') or ''} {row['text']}".strip() for row in collection.corpus]
    prompts = PROMPTS["retrieval"], None
    found = search(encoder, queries, documents, TOP_K, prompts=prompts, dim=dim)
    gains, judged = np.zeros(found.shape), [list(answers.values()) for answers in relevant]
    for row, ranks, answers in zip(gains, found, relevant):
        for document, gain in answers.items():
            row[ranks == document] = gain
    return {
        "ndcg@10": ndcg_at_k(gains, 10, judged),
        **{f"recall@{k}": recall_at_k(gains, k, judged) for k in (1, 10, 20, 100)},
        "map": mean_average_precision(gains, judged=judged),
        "mrr@10": mrr_at_k(gains, 10),
        "hit@1": hit_at_k(gains, 1),
    }


def bitext_mining(encoder, rows, dim=None):
    """Find each sentence's translation among all of the group's, query -> pos and back.

    Positions count, as in MTEB: an equal sentence elsewhere in the group is a mistake.
    """
    prompts, results = [PROMPTS.get("bitext")] * 2, {}
    queries, passages = [row["query"] for row in rows], [row["pos"] for row in rows]
    for left, right, suffix in ((queries, passages, ""), (passages, queries, "_reverse")):
        best = search(encoder, left, right, 1, prompts=prompts, dim=dim)[:, 0]
        gold = np.arange(len(rows))
        results["accuracy" + suffix] = accuracy(gold, best)
        results["f1" + suffix] = f1(gold, best, average="weighted")
    return results


def sts(encoder, rows, dim=None):
    """Correlate the cosine of sentence1 and sentence2 with `score`, by rank."""
    left, right = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    cosine = similarity(encoder, left, right, prompts=[PROMPTS.get("sts")] * 2, dim=dim)
    return {"spearman": spearman([row["score"] for row in rows], cosine)}


def pair_classification(encoder, rows, dim=None):
    """Rank pairs by similarity; average precision of `label` 1 (`max_ap` also tries Manhattan).

    Of unit vectors, dot product and Euclidean distance rank pairs exactly as the cosine does.
    """
    left, right = [row["sentence1"] for row in rows], [row["sentence2"] for row in rows]
    labels, prompt = [row["label"] for row in rows], PROMPTS.get("pair_classification")
    if set(labels) - {0, 1}:
        raise ValueError(f"pair labels must be 0 or 1, got {sorted(set(labels), key=str)[:5]}")
    cosine = similarity(encoder, left, right, prompts=(prompt, prompt), dim=dim)
    ap = average_precision(labels, cosine)
    if isinstance(encoder, LexicalBaseline):
        return {"ap": ap, "max_ap": ap}
    left, right = (encoder.encode(side, prompt=prompt, truncate_dim=dim) for side in (left, right))
    return {"ap": ap, "max_ap": max(ap, average_precision(labels, -np.abs(left - right).sum(1)))}


def reranking(encoder, rows, dim=None):
    """Rank each query's own pos and neg; rows that lack either are left out, as in MTEB."""
    rows = [row for row in rows if row["pos"] and row["neg"]]
    # Negatives first: the lower index wins a tie, and a tie must not count as a success.
    candidates = [(*row["neg"], *row["pos"]) for row in rows]
    queries = [row["query"] for row, texts in zip(rows, candidates) for _ in texts]
    documents = [text for texts in candidates for text in texts]
    prompts = PROMPTS["retrieval"], None
    scores = similarity(encoder, queries, documents, prompts=prompts, dim=dim)
    gains, ends = [], np.cumsum([len(texts) for texts in candidates])
    for row, part in zip(rows, np.split(scores, ends[:-1])):
        gains.append(np.argsort(-part, kind="stable") >= len(row["neg"]))
    return {
        "map": mean_average_precision(gains),
        "mrr@10": mrr_at_k(gains, 10),
        "ndcg@10": ndcg_at_k(gains, 10),
    }


def summarization(encoder, rows, dim=None):
    """Correlate each machine summary's best cosine to a human one with its human grade, per text.

    The mean of the texts' Spearman; texts whose grades or cosines are all equal are left out.
    """
    pairs = [
        (i, m, machine, human)
        for i, row in enumerate(rows)
        for m, machine in enumerate(row["machine_summaries"])
        for human in row["human_summaries"]
    ]
    left, right = [pair[2] for pair in pairs], [pair[3] for pair in pairs]
    prompts, best = [PROMPTS.get("summarization")] * 2, {}
    cosines = similarity(encoder, left, right, prompts=prompts, dim=dim)
    for (i, m, *_), cosine in zip(pairs, cosines):
        best[i, m] = max(cosine, best.get((i, m), -np.inf))
    each = []
    for i, row in enumerate(rows):
        cosines = [best[i, m] for m in range(len(row["machine_summaries"]))]
        if len(set(cosines)) > 1 and len(set(row["relevance"])) > 1:
            each.append(spearman(row["relevance"], cosines))
    return {"spearman": float(np.mean(each)) if each else 0.0}


def classification(encoder, rows, dim=None, n_experiments=10, samples_per_label=8, seed=42):
    """Fit logistic regression on a few rows of each label with split "train", score the others.

    Mean of `n_experiments` draws; the draws are the very ones of mteb.
    """
    train = [row for row in rows if row["split"] == "train"]
    test = [row for row in rows if row["split"] != "train"]
    if not train or not test:
        raise ValueError(f"classification got {len(train)} rows to fit and {len(test)} to score")
    prompt = PROMPTS.get("classification")
    codes = np.unique([str(row["label"]) for row in train + test], return_inverse=True)[1]
    train_codes, test_codes = codes[: len(train)], codes[len(train) :]
    test_vectors = encoder.encode([row["text"] for row in test], prompt=prompt, truncate_dim=dim)
    scores, order = [], np.arange(len(train))
    for _ in range(n_experiments):
        np.random.RandomState(seed).shuffle(order)  # one seed, but the order before it differs
        left, chosen = Counter(), []
        for i in order.tolist():
            if left[train_codes[i]] < samples_per_label:
                left[train_codes[i]] += 1
                chosen.append(i)
        texts = [train[i]["text"] for i in chosen]
        vectors = encoder.encode(texts, prompt=prompt, truncate_dim=dim)
        predicted = logistic_regression(vectors, train_codes[chosen])(test_vectors)
        scores.append(
            {"accuracy": accuracy(test_codes, predicted), "f1": f1(test_codes, predicted)}
        )
    return mean_of(scores)


def clustering(encoder, rows, dim=None, n_experiments=10, sample_size=16384, seed=42):
    """Cluster samples of the rows into as many groups as labels -> V-measure, averaged.

    DEVIATES: a sample, drawn with replacement as in MTEB, has at most as many rows as there are;
    mteb draws 16,384 even from fewer.
    """
    vectors = encoder.encode(
        [row["text"] for row in rows], prompt=PROMPTS.get("clustering"), truncate_dim=dim
    )
    labels, scores = np.array([str(row["label"]) for row in rows]), []
    n_clusters, draw = len(set(labels.tolist())), np.random.default_rng(seed)
    for _ in range(n_experiments):
        sample = draw.integers(len(rows), size=min(len(rows), sample_size))
        clusters = mini_batch_k_means(vectors[sample], n_clusters, draw)
        scores.append({"v_measure": v_measure(labels[sample], clusters)})
    return mean_of(scores)


# ---------------------------------------------------------------- for classification and clustering


def logistic_regression(features, labels, c=1.0, max_iter=100):
    """Fit multinomial logistic regression -> predict(features (M, D)) -> (M,) labels.

    Minimises mean cross-entropy + |W|^2 / (2 c N), the bias free, by L-BFGS: the objective of
    scikit-learn's LogisticRegression(C=c), whose two-class form has one weight vector, not two.
    """
    names, codes = np.unique(labels, return_inverse=True)
    x, y = torch.as_tensor(features, dtype=torch.float64), torch.as_tensor(codes)
    if len(names) == 1:
        return lambda features: np.full(len(features), names[0])
    free = len(names) - 1 if len(names) == 2 else len(names)
    weight = torch.zeros(x.shape[1], free, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(free, dtype=torch.float64, requires_grad=True)

    def logits(x):
        scores = x @ weight + bias  # (N, free)
        return scores if free > 1 else torch.cat([torch.zeros_like(scores), scores], dim=1)

    def objective():
        optimizer.zero_grad()
        penalty = weight.square().sum() / (2 * c * len(x))
        loss = torch.nn.functional.cross_entropy(logits(x), y) + penalty
        loss.backward()
        return loss

    optimizer = torch.optim.LBFGS(
        [weight, bias], max_iter=max_iter, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )
    with torch.enable_grad():
        optimizer.step(objective)

    @torch.no_grad()
    def predict(features):
        return names[logits(torch.as_tensor(features, dtype=torch.float64)).argmax(1).numpy()]

    return predict


def mini_batch_k_means(x, k, draw, batch_size=512, max_epochs=100, patience=10):
    """Cluster (N, D) into k groups -> (N,) cluster numbers; `draw` is a numpy Generator.

    Starts from k-means++; every batch moves each centre to the mean of all rows it has got so
    far, until the smoothed batch error has not fallen for `patience` batches.
    DEVIATES from scikit-learn's in small ways: only centres without any row are drawn anew.
    """
    x = np.asarray(x, dtype=np.float64)
    batch_size = min(batch_size, len(x))
    centers = _k_means_plus_plus(x[draw.permutation(len(x))[: max(3 * batch_size, k)]], k, draw)
    counts, smooth, best, waited = np.zeros(k), None, np.inf, 0
    memory = min(1.0, 2 * batch_size / (len(x) + 1))
    for _ in range(max(1, max_epochs * len(x) // batch_size)):
        batch = x[draw.integers(len(x), size=batch_size)]
        distance = _squared_distances(batch, centers)  # (batch, k)
        got = np.eye(k)[distance.argmin(1)].T  # (k, batch) one-hot
        counts += got.sum(1)
        step = (got @ batch - got.sum(1)[:, None] * centers) / np.maximum(counts, 1)[:, None]
        centers += step
        empty = np.flatnonzero(counts == 0)
        centers[empty] = x[draw.integers(len(x), size=len(empty))]
        error = distance.min(1).mean()
        smooth = error if smooth is None else smooth + memory * (error - smooth)
        best, waited = (smooth, 0) if smooth < best else (best, waited + 1)
        if waited >= patience:
            break
    return _squared_distances(x, centers).argmin(1)


def _k_means_plus_plus(x, k, draw):
    """Choose k rows far from each other: each the best of a few drawn by squared distance."""
    centers = x[draw.integers(len(x), size=1)]
    closest = _squared_distances(x, centers)[:, 0]  # (N,)
    while len(centers) < k:
        total = closest.sum()
        p = closest / total if total > 0 else None  # None: every row is a centre already
        tried = draw.choice(len(x), size=2 + int(np.log(k)), p=p)
        after = np.minimum(closest[:, None], _squared_distances(x, x[tried]))  # (N, tried)
        winner = after.sum(0).argmin()
        centers, closest = np.vstack([centers, x[tried[winner]]]), after[:, winner]
    return centers


def _squared_distances(x, y):
    squares = (x * x).sum(1)[:, None] - 2 * x @ y.T + (y * y).sum(1)
    return np.maximum(squares, 0)


# ---------------------------------------------------------------- Figure 3


def language_separation(encoder, rows, dim=None, seed=0):
    """Measure how far languages lie apart: Figure 3 as numbers.

    language_accuracy: a linear probe, fitted on half of each language's rows, names the language
    of the other half (1 = separate clusters; near `chance` = one distribution); centroid_distance:
    mean over pairs of languages; spread: root mean squared distance of texts to their centroid.
    """
    vectors, codes, languages = _by_language(encoder, rows, dim)
    order = np.random.default_rng(seed).permutation(len(codes))
    order = order[np.argsort(codes[order], kind="stable")]  # shuffled within each language
    fit, held = order[::2], order[1::2]
    probe = logistic_regression(vectors[fit], codes[fit])
    centers = np.stack([vectors[codes == code].mean(0) for code in range(len(languages))])
    distance = np.sqrt(_squared_distances(centers, centers))
    return {
        "language_accuracy": accuracy(codes[held], probe(vectors[held])),
        "chance": float(np.bincount(codes[held]).max() / len(held)),
        "centroid_distance": float(distance[np.triu_indices(len(languages), 1)].mean()),
        "spread": float(np.sqrt(((vectors - centers[codes]) ** 2).sum(1).mean())),
    }


def draw_languages(encoder, rows, path):
    """Draw Figure 3 of the texts as a PNG."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print(f"{path} is not drawn: that needs pip install matplotlib")
        return
    figure = Figure(figsize=(6, 6))
    plot = figure.add_subplot()
    scatter_languages(encoder, rows, plot)
    plot.legend(markerscale=3, fontsize="small", ncols=1 + len(languages_in(rows)) // 12)
    plot.set(title="Embeddings by language")
    figure.savefig(path, dpi=150)


def scatter_languages(encoder, rows, plot):
    """Draw the first two principal components of the texts into a plot, a colour per language."""
    from matplotlib import colormaps

    vectors, codes, languages = _by_language(encoder, rows)
    centered = vectors - vectors.mean(0)
    widest = np.linalg.eigh(centered.T @ centered)[1][:, :-3:-1]  # (D, 2)
    points = centered @ widest  # (N, 2)
    for code, language in enumerate(languages):
        color = [colormaps["turbo"]((code + 0.5) / len(languages))]
        plot.scatter(*points[codes == code].T, s=4, alpha=0.5, c=color, label=language)
    plot.set(xlabel="first principal component", ylabel="second")


def _by_language(encoder, rows, dim=None):
    languages, texts, codes = languages_in(rows), [], []
    if len(languages) < 2:
        raise ValueError(f"Figure 3 needs texts with `lang` in two languages, got {languages}")
    for code, language in enumerate(languages):
        own = [row["text"] for row in rows if row["lang"] == language][:PER_LANGUAGE]
        texts, codes = texts + own, codes + [code] * len(own)
    return encoder.encode(texts, truncate_dim=dim), np.array(codes), languages
