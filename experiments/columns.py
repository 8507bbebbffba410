"""Table 1's columns over local files: the rows each task type gets, and scores that are kept.

MTEB's sets are not at hand everywhere, its task types are. Of the embedded corpus's held-out texts

    Class., Clust.   text -> package                 PairClass   a summary with its own body (1) or
    Retri            summary -> body                             with its neighbour's by name (0)
    Rerank           body among BM25's first ten     STS         two summaries, graded by name

and of a folder of public sets what its held-out rows are good for (sets.py has the forms). Summ.
needs graded summaries, which neither has. DEVIATES: sets and languages are not the paper's, so
columns compare models here, not with the paper.
"""
import dataclasses
import hashlib
import json
import os
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from toy import corpus
from tools import sets
import tasks
from engine.bm25 import BM25
from data import load_collection, read_jsonl
from embed import Embedder
from eval import HELD_OUT, TABLE_1, choose_split, part_of

METRICS = {"Class.": (tasks.classification, "accuracy"), "Clust.": (tasks.clustering, "v_measure"),
           "PairClass": (tasks.pair_classification, "ap"), "Rerank": (tasks.reranking, "map"),
           "Retri": (tasks.retrieval, "ndcg@10"), "STS": (tasks.sts, "spearman"),
           "Summ.": (tasks.summarization, "spearman")}
NEED_VECTORS = ("Class.", "Clust.")    # BM25 has none
LEAST = 16                             # entries of a package: eight to fit from, eight to score
CANDIDATES, RERANKED = 10, 500         # of a query in reranking, and queries


@dataclass(frozen=True)
class LocalSet:
    """A set of one column: rows, or a retrieval collection."""
    column: str
    name: str
    data: object


def local_sets(run_docs, root, lang):
    """Return the `LocalSet`s of a language: of the folder `root` if given, else of the corpus."""
    return of_folder(root, lang) if root else of_corpus(Path(run_docs), lang)


# ---------------------------------------------------------------- the embedded corpus

def of_corpus(docs, lang):
    """Return the sets of the embedded corpus; its only Chinese is queries put through clr.py."""
    if lang != "en":
        found = load_collection(docs / "clr_test")
        return [LocalSet("Retri", f"clr_test {lang}-en", part_of(found, lang, "en"))]
    found = load_collection(docs / "test")
    labelled = halves(list(read_jsonl(docs / "labelled_test.jsonl", {"text": str, "label": str})))
    named = sorted(({"name": row["id"], "summary": row["text"]} for row in found.queries),
                   key=lambda row: row["name"])
    made = {"Class.": labelled, "Clust.": labelled, "PairClass": neighbours(found),
            "Rerank": candidates(found), "Retri": found,
            "STS": list(corpus.sts_rows(named, n=1000))}
    return [LocalSet(column, "installed_docs", data) for column, data in made.items()]


def halves(rows):
    """Give every other row of a label to "train", the rest to "test"; rare labels are left out."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["label"]].append(row)
    return [{**row, "split": ("train", "test")[i % 2]} for group in groups.values()
            if len(group) >= LEAST for i, row in enumerate(group)]


def neighbours(collection):
    """Return pairs: each query with its own document (1), and with the next one's by name (0)."""
    texts = {row["id"]: row["text"] for row in collection.corpus}
    asked = sorted(collection.queries, key=lambda row: row["id"])
    pairs = []
    for row, after in zip(asked, asked[1:] + asked[:1]):
        for other, label in ((row, 1), (after, 0)):
            pairs.append({"sentence1": row["text"], "sentence2": texts[other["id"]],
                          "label": label})
    return pairs


def candidates(collection):
    """Return reranking rows: a query's relevant documents, and BM25's best of the others."""
    queries, relevant = tasks.judged_queries(collection)
    queries, relevant = queries[:RERANKED], relevant[:RERANKED]
    documents = [sets.joined(row) for row in collection.corpus]
    most = CANDIDATES + max(map(len, relevant), default=0)
    ranked = BM25(documents).top_k(queries, most)[0].tolist()
    return [{"query": query, "pos": [documents[i] for i in own],
             "neg": [documents[i] for i in found if i not in own][:CANDIDATES]}
            for query, own, found in zip(queries, relevant, ranked)]


# ---------------------------------------------------------------- a folder of public sets

def of_folder(root, lang):
    """Return the sets that the held-out rows of a folder make in one language."""
    found = []
    for folder in sorted(path for path in Path(root).iterdir() if path.is_dir()):
        files = {path.name.split(".")[0]: path for path in sorted(folder.glob("*.jsonl*"))}
        if {"corpus", "queries"} <= files.keys():
            found += of_collection(folder, lang)
        else:
            found += [made for path in files.values() for made in of_rows(folder.name, path, lang)]
    return found


def of_collection(folder, lang):
    """Return retrieval and reranking of a collection's held-out queries in one language."""
    found = load_collection(folder)
    queries, split = choose_split(found.queries, None, folder)
    part = part_of(dataclasses.replace(found, queries=queries), lang, lang)
    if split == "all" and not sets.is_for_evaluation(folder) or not tasks.judged_queries(part)[0]:
        return []
    return [LocalSet("Retri", folder.name, part), LocalSet("Rerank", folder.name, candidates(part))]


def of_rows(name, path, lang):
    """Return what the held-out rows of a file make, by the columns that they have."""
    columns = sets.columns_of(path)
    kind = next((kind for kind, needed in (
        ("STS", {"sentence1", "sentence2", "score"}),
        ("PairClass", {"sentence1", "sentence2", "label"}),
        ("Class.", {"text", "label"})) if needed <= columns), None)
    rows = [row for row in read_jsonl(path) if row.get("lang", "en") == lang] if kind else []
    there = {row.get("split") for row in rows}
    if kind == "PairClass" and not there & set(HELD_OUT):
        rows = [row for row in rows if "id" in row and sets.is_held_out(row["id"])]   # as sets.py
        return [LocalSet(kind, name, rows)] if rows else []
    if not there & set(HELD_OUT) or kind == "Class." and "train" not in there:
        return []
    rows, _ = choose_split(rows, None, path, with_train=kind == "Class.")
    if kind != "Class.":
        return [LocalSet(kind, name, rows)]
    held = [row for row in rows if row["split"] != "train"]
    return [LocalSet("Class.", name, rows), LocalSet("Clust.", name, held)]


# ---------------------------------------------------------------- scores

class Kept:
    """Scores by model and data, in a file: tables share them, an interrupted one goes on."""

    def __init__(self, path):
        self.path = Path(path)
        self.scores = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def get(self, identity, task, data, compute):
        """Return the score of a model on data; `compute()` it and write it down if it is new."""
        value = dataclasses.asdict(data) if dataclasses.is_dataclass(data) else data
        text = json.dumps([identity, task, value], sort_keys=True)
        key = hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:32]
        if key not in self.scores:
            self.scores[key] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            part = self.path.with_suffix(f".{os.getpid()}")
            part.write_text(json.dumps(self.scores, indent=0))
            os.replace(part, self.path)
        return self.scores[key]


def identity_of(encoder):
    """Return what tells a model from others: the hash of its checkpoint, or how it embeds."""
    if isinstance(encoder, tasks.LexicalBaseline):
        return "BM25"
    if isinstance(encoder, Embedder):
        return encoder.fingerprint()
    probe = np.asarray(encoder.encode(["What the identity is a hash of."]), dtype=np.float64)
    return hashlib.sha256((np.round(probe, 3) + 0.0).tobytes()).hexdigest()[:16]


def score(encoder, item, kept, identity):
    """Return the percentage of an encoder on a `LocalSet`; None where BM25 lacks vectors."""
    if identity == "BM25" and item.column in NEED_VECTORS:
        return None
    function, metric = METRICS[item.column]
    return 100 * kept.get(identity, item.column, item.data,
                          lambda: function(encoder, item.data)[metric])


def by_column(scored):
    """Return {column: mean over its sets} and "Avg." over all sets, of [(LocalSet, percentage)].

    Avg. is over sets, as MTEB's is over tasks; it is None where one of them has no score.
    """
    found = {}
    for column in METRICS:
        values = [value for item, value in scored if item.column == column]
        found[column] = mean(values) if values else None
    assert list(found) == list(TABLE_1)[:-1]           # the columns that eval.py prints
    return {**found, "Avg.": mean([value for _, value in scored])}


def mean(values):
    """Return the mean, None of nothing or where one is None."""
    return float(np.mean(values)) if values and None not in values else None
