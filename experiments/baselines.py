"""Score what the method has to beat, and a trained model beside it; one code scores all.

    python -m experiments.baselines                           # the built-in corpus
    python -m experiments.baselines --data=out/real/sets --root=FOLDER --out=results/real.json \\
        --checkpoint=out/real/embed_sup,out/seed1/embed_sup --sentence_transformer=NAME

BM25, an IDF bag of random vectors, the same aligned where there is bitext, and a stock model if one
is named. With --root: on the public sets that nothing was trained on (tools/sets.py); the headline
is what CLR is for, questions in other languages on English passages (PAPER Sec. 3.3).

A bag needs no training: each token is a random vector times its IDF, a text their mean. It finds
words that a query and a document share. IBM model 1 (Brown et al. 1993) learns from bitext which
tokens translate each other, and mixes their vectors: the bag becomes bilingual.
None of this is the paper's. It stands beside the method, not inside it.
"""
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import load_config, run_command
from data import open_rows, sources
from embed import Embedder
from engine.collection import collections_in
from engine.jsonl import read_jsonl
from eval import LexicalBaseline, SentenceTransformerBaseline, evaluate
from experiments.results import interval, markdown
from experiments.runs import write_result
from tokenizer import Tokenizer
from tools import sets
from train import TrainConfig

SENTENCE_TOKENS = 64               # read of each side of bitext: a cut sentence lacks translations
METRICS = {"retrieval": "ndcg@10", "bitext": "accuracy", "sts": "spearman",
           "classification": "accuracy", "pair_classification": "ap"}
SHOWN = {"en", "zh", "ja"}          # languages that the table shows; the file has all
HEADLINE = "retrieval, other languages -> English, ndcg@10"
OURS = "nanoConan, "               # and the checkpoint: a trained model's label


@dataclass(frozen=True)
class BaselinesConfig:
    """The settings of `python -m experiments.baselines`."""
    data: str = "out/installed_docs"       # a folder in the layout of train.py's `data`
    root: str = ""                 # folder of public sets to score on; empty: DATA's collections
    checkpoint: tuple[str, ...] = ()       # trained models, scored as well: seeds of one recipe
    max_len: int = 0               # tokens it reads of a text; 0: its passage_len
    sentence_transformer: str = ""         # a stock model, scored as well: name or folder
    trust_remote_code: bool | None = None  # whether that model's own code may run
    vocab_size: int = 24_576       # of the bags' tokenizer
    dim: int = 768                 # of the bags' vectors
    weight: float = 3.0            # of a token's translations, its own vector having 1
    out: str = "results/baselines.json"


# ---------------------------------------------------------------- a bag of random vectors

class BagOfVectors:
    """An encoder: the mean of its tokens' vectors. It ignores instructions.

    tokenizer: of V entries; table: (V, D) float32, each row a token's vector times its weight.
    """

    def __init__(self, tokenizer, table):
        self.tokenizer, self.table = tokenizer, np.asarray(table, dtype=np.float32)

    def encode(self, texts, **_):
        """Return unit vectors (N, D) float32; a text without tokens gives zeros."""
        out = np.zeros((len(texts), self.table.shape[1]), dtype=np.float32)
        for row, ids in zip(out, self.tokenizer.encode_batch(list(texts))):
            if ids:
                row[:] = self.table[ids].mean(0)
        return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-12)


def idf(tokenizer, texts, vocab_size):
    """Return log(N / (1 + documents with the token)), (V,) float64, at least 0."""
    counts = np.zeros(vocab_size)
    for ids in tokenizer.encode_batch(texts):
        counts[np.unique(np.array(ids, dtype=np.int64))] += 1
    return np.log(len(texts) / (1 + counts)).clip(min=0)


def random_table(weights, dim, seed=0):
    """Return (V, D): random directions from N(0, 1 / D), times the tokens' weights (V,)."""
    vectors = np.random.default_rng(seed).standard_normal((len(weights), dim)) / dim ** 0.5
    return (vectors * weights[:, None]).astype(np.float32)


# ---------------------------------------------------------------- IBM model 1

def model_1(pairs, vocab_size, rounds=5):
    """Return the token pairs that share a sentence pair, and their translation probabilities.

    pairs: [(left ids, right ids)], each a sorted int64 array of the distinct tokens of a sentence.
    Returns arrays of one length: left id, right id, t(right | left), t(left | right), and the
    expected count of left being translated by right.
    """
    sizes = [(len(left), len(right)) for left, right in pairs]
    left = np.concatenate([np.repeat(a, n) for (a, _), (_, n) in zip(pairs, sizes)])
    right = np.concatenate([np.tile(b, n) for (_, b), (n, _) in zip(pairs, sizes)])
    sentence = np.repeat(np.arange(len(pairs)), [a * b for a, b in sizes])
    kinds, kind = np.unique(left * vocab_size + right, return_inverse=True)
    a, b = np.divmod(kinds, vocab_size)

    def maximise(source, target):
        """Share each target token of a sentence out among its source tokens, by t."""
        _, place = np.unique(sentence * vocab_size + target, return_inverse=True)
        t = np.ones(len(kinds))
        for _ in range(rounds):
            share = t[kind]
            share /= np.bincount(place, share)[place]                       # E step
            count = np.bincount(kind, share, minlength=len(kinds))
            t = count / np.bincount(source, count)[source]                  # M step
        return t, count

    forward, count = maximise(a, right)
    return a, b, forward, maximise(b, left)[0], count


def translation_matrix(bitext, vocab_size, least=0.01, smallest=500):
    """Return (V, V) sparse float32: row i holds what token i translates to, summing to 1.

    bitext: {(language, language): [(ids, ids)]}. Every language pair counts by itself, since one
    string means different things in two languages. Pairs of fewer than `smallest` sentences are
    left out, and entries whose two directions multiply to less than `least`. English gets no rows:
    the others are drawn to it.
    """
    rows, columns, counts = [], [], []
    for (left, right), pairs in bitext.items():
        if len(pairs) < smallest:
            continue
        a, b, forward, backward, count = model_1(pairs, vocab_size)
        likely = forward * backward >= least
        for source, target, language in ((a, b, left), (b, a, right)):
            if language != "en":
                rows.append(source[likely])
                columns.append(target[likely])
                counts.append(count[likely])
    if not rows:
        return torch.zeros(vocab_size, vocab_size, layout=torch.sparse_coo)
    place = np.stack([np.concatenate(rows), np.concatenate(columns)])
    count = np.concatenate(counts)
    share = count / np.bincount(place[0], count, minlength=vocab_size)[place[0]]
    return torch.sparse_coo_tensor(place, share, (vocab_size, vocab_size), dtype=torch.float32,
                                   check_invariants=True).coalesce()


def aligned(vectors, matrix, weight, rounds=2):
    """Return (V, D) float32 `vectors`, each mixed with those of its translations.

    weight: of the translations. Two rounds, as a token may reach English through a third language.
    A length, which is the token's IDF, falls to the mean of its translations' if that is less: a
    question word is rare where its language is, and no keyword there.
    """
    own = vectors.norm(dim=1, keepdim=True)
    mixed, length = vectors, own
    has_translation = torch.sparse.mm(matrix, torch.ones_like(own)) > 0
    for _ in range(rounds):
        mean = torch.sparse.mm(matrix, length)
        length = torch.where(has_translation, torch.minimum(own, mean), own)
        mixed = vectors + weight * torch.sparse.mm(matrix, mixed)
        mixed = mixed * (length / mixed.norm(dim=1, keepdim=True).clamp(min=1e-12))
    return mixed


def read_bitext(files, tokenizer):
    """Return {(language, language): [(ids, ids)]} of the pairs that are translations.

    A translation names two languages, lang_q and lang_p, and its prompt is empty: tools/sets.py.
    """
    bitext = defaultdict(list)
    for row in (row for file in files for row in read_jsonl(file)):
        if row.get("prompt") != "" or row.get("lang_q") == row.get("lang_p"):
            continue
        passage = row["pos"] if isinstance(row["pos"], str) else row["pos"][0]
        sides = sorted([(row["lang_q"], row["query"]), (row["lang_p"], passage)])
        ids = [np.unique(tokenizer.encode(text)[:SENTENCE_TOKENS]) for _, text in sides]
        if all(map(len, ids)):
            bitext[sides[0][0], sides[1][0]].append(tuple(ids))
    return bitext


# ---------------------------------------------------------------- all of them, scored

def encoders(cfg):
    """Yield (label, encoder): the trained models, then what they are compared with."""
    for checkpoint in cfg.checkpoint:
        ours = Embedder(checkpoint)
        ours.max_len = cfg.max_len or ours.max_len
        yield f"{OURS}{checkpoint}", ours
    yield "BM25", LexicalBaseline()
    if cfg.sentence_transformer:
        name = cfg.sentence_transformer
        yield Path(name).name, SentenceTransformerBaseline(name, cfg.trust_remote_code)
    base = TrainConfig(data=cfg.data)
    rows = open_rows(sources(base, "text"), "text")
    texts = [rows[i] for i in range(len(rows))]
    tokenizer = Tokenizer.train(texts, cfg.vocab_size)
    table = random_table(idf(tokenizer, texts, cfg.vocab_size), cfg.dim)
    yield "IDF bag of random vectors", BagOfVectors(tokenizer, table)
    if bitext := read_bitext(sources(base, "pairs"), tokenizer):
        matrix = translation_matrix(bitext, cfg.vocab_size)
        yield "the same, aligned by IBM model 1", BagOfVectors(
            tokenizer, aligned(torch.from_numpy(table), matrix, cfg.weight))


def jobs(cfg):
    """Return [(task, file or folder)] to score, on which nothing was trained or chosen."""
    if not cfg.root:
        return [("retrieval", folder) for folder in collections_in(cfg.data)]
    work = [("retrieval", folder) for folder in sets.held_out_collections(cfg.root)]
    work += [("pair_classification" if "sentence1" in sets.columns_of(path) else "bitext", path)
             for path in sorted(Path(cfg.data).glob("held_out/*/*.jsonl"))]
    for path in sorted(Path(cfg.root).glob("*/data.jsonl*")):
        columns = sets.columns_of(path)
        if {"split", "score"} <= columns:
            work.append(("sts", path))
        elif {"text", "label", "split"} <= columns:
            work.append(("classification", path))
    return work


def main_scores(scores):
    """Return those of some flat scores whose metric is the task's main one."""
    return {key: value for key, value in scores.items()
            if key.rpartition("/")[2] == METRICS[key.partition("/")[0]]}


def headline(scores):
    """Return {row of the table: number} of one model's main scores, the headline first.

    Of a set in many languages the table shows the mean, and those of `SHOWN`.
    """
    rows, foreign = {}, []
    for key, value in scores.items():
        task, name, subset, metric = key.split("/")
        has_mean = f"{task}/{name}/mean/{metric}" in scores
        if not has_mean or subset == "mean" or set(subset.split("-")) <= SHOWN:
            rows[f"{task} {name} {subset}, {metric}"] = value
        if task == "retrieval" and subset.endswith("-en") and subset != "en-en":
            foreign.append(value)
    return ({HEADLINE: float(np.mean(foreign))} if foreign else {}) | rows


def table_of(scores):
    """Return the rows of the table: our models' mean and its 95 % interval, then all others."""
    columns = {label: headline(own) for label, own in scores.items()}
    ours = [columns.pop(label) for label in scores if label.startswith(OURS)]
    rows = []
    for name in dict.fromkeys(name for column in (*ours, *columns.values()) for name in column):
        row = {"": name}
        if ours:
            row["nanoConan"], half = interval(column[name] for column in ours)
        if len(ours) > 1:
            row["± 95 %"] = half
        rows.append(row | {label: column.get(name) for label, column in columns.items()})
    return rows


def main(argv=None):
    """Score every encoder on every set, print the table, write the file."""
    argv = sys.argv[1:] if argv is None else list(argv)
    cfg = load_config(BaselinesConfig, argv)
    work, scores = jobs(cfg), {}
    if not work:
        raise ValueError(f"{cfg.root or cfg.data}: no set to score")
    for label, encoder in encoders(cfg):
        scores[label] = {}
        for task, place in work:
            if task in ("retrieval", "bitext") or not isinstance(encoder, LexicalBaseline):
                scores[label] |= main_scores(evaluate(encoder, task, place))
                print(f"{label}: {task} {place}", flush=True)
        rows = table_of(scores)
        path = write_result(Path(cfg.out).parent, Path(cfg.out).stem, {
            "title": "Public sets, from random weights" if cfg.root else "Baselines",
            "tables": {"": rows}, "scores": scores,
            "command": " ".join(["python -m experiments.baselines", *argv])})
    print("\n".join(["", *markdown(rows)]))
    return path


if __name__ == "__main__":
    run_command(main)
