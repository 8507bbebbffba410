"""Retrieval collections as BEIR publishes them: corpus.jsonl, queries.jsonl and qrels.

Each file may be plain or .gz; ids are `id` or `_id`; qrels are qrels.tsv or qrels/SPLIT.tsv, with
a header or without. Every error names file and line.
"""
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

from engine.jsonl import lines_of, read_jsonl
from engine.splits import HELD_OUT


@dataclass
class Collection:
    """A retrieval collection: rows with ids, and qrels {query id: {document id: relevance}}.

    split: the name of the qrels, None where rows name it. without_self: a ranking leaves out the
    document whose id is the query's own.
    """
    name: str
    corpus: list
    queries: list
    qrels: dict
    split: str | None = None
    without_self: bool = False


def document_text(row):
    """Return a document as it is embedded: its title, one space and its text, as mteb joins them.

    >>> document_text({"title": "Cats", "text": "They purr."}), document_text({"text": "No title."})
    ('Cats They purr.', 'No title.')
    """
    return f"{row.get('title') or ''} {row['text']}".strip()


def read_with_ids(path):
    """Yield the rows of a corpus.jsonl or queries.jsonl; BEIR's `_id` is taken for `id`.

    Raises ValueError by file and line for an id that is missing, no string, or there twice.
    """
    seen = set()
    for number, row in enumerate(read_jsonl(path, {"text": str}), 1):
        key = row.get("id", row.get("_id"))
        if not isinstance(key, str):
            raise ValueError(f"{path}:{number}: id or _id must be a string, not {key!r}; the keys "
                             f"are {sorted(row)[:8]}")
        if key in seen:
            raise ValueError(f"{path}:{number}: id {key!r} comes twice")
        seen.add(key)
        yield {**row, "id": key}


def find_packed(path):
    """Return a file or its .gz, whichever is there; FileNotFoundError by name without either."""
    for found in (Path(path), Path(f"{path}.gz")):
        if found.is_file():
            return found
    raise FileNotFoundError(f"{path}: no such file (nor {Path(path).name}.gz)")


def find_qrels(directory, split=None):
    """Return (file, split or None) of a folder's qrels.tsv or, as in BEIR, qrels/SPLIT.tsv.

    Of several splits, the one that is named or the first of HELD_OUT.
    """
    splits = [(f"qrels/{name}.tsv", name) for name in ([split] if split else HELD_OUT)]
    for name, of_file in [*splits[:bool(split)], ("qrels.tsv", None), *splits]:
        for path in (directory / name, directory / f"{name}.gz"):
            if path.is_file():
                return path, of_file
    there = sorted({path.name.partition(".")[0] for path in (directory / "qrels").glob("*.tsv*")})
    raise FileNotFoundError(f"{directory / 'qrels.tsv'}: no such file, nor {splits[0][0]}; "
                            f"the splits in qrels/ are {there}")


def read_qrels(path, queries, documents):
    """Return {query id: {document id: relevance}} of a file, plain or .gz.

    Three columns and a header or none, or TREC's four; blank lines at the end are passed over.
    queries, documents: the known ids. Raises ValueError by file and line, for any other id too.
    """
    qrels = {}
    for number, line in lines_of(path):
        try:
            cells = line.decode("utf-8-sig").rstrip("\r\n").split("\t")
            if number == 1 and cells[-1].strip() == "score":
                continue
            query, *_, document, score = cells             # _: TREC's second column
            score = float(score)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}:{number}: not UTF-8 ({error.reason})") from None
        except ValueError:
            raise ValueError(f"{path}:{number}: query-id, corpus-id and a number are needed, not "
                             f"{str(line[:80])[2:-1]}") from None
        if not math.isfinite(score):
            raise ValueError(f"{path}:{number}: the score {score} is not finite")
        for kind, key, known in (("query", query, queries), ("document", document, documents)):
            if key not in known:
                raise ValueError(f"{path}:{number}: unknown {kind} {key!r}")
        if qrels.setdefault(query, {}).setdefault(document, score) != score:
            raise ValueError(f"{path}:{number}: query {query!r} and document {document!r} have "
                             f"two scores, {qrels[query][document]} and {score}")
    return qrels


def load_collection(directory, split=None, ignore_identical_ids=None):
    """Read the corpus.jsonl, queries.jsonl and qrels of a folder, each plain or .gz.

    split: one of qrels/SPLIT.tsv, or the queries whose row says `"split": split`. Queries without a
    judged document are left out, unless their row has `answers`. ignore_identical_ids: leave the
    document with a query's own id out of its ranking; None: if such a pair has equal texts and is
    not judged relevant, as in ArguAna. Raises ValueError by file and line.
    """
    directory = Path(directory)
    corpus = list(read_with_ids(find_packed(directory / "corpus.jsonl")))
    queries = list(read_with_ids(find_packed(directory / "queries.jsonl")))
    texts, qrels, of_file = {row["id"]: row["text"] for row in corpus}, {}, None
    try:
        path, of_file = find_qrels(directory, split)
        qrels = read_qrels(path, {row["id"] for row in queries}, texts)
    except FileNotFoundError:
        if not any(row.get("answers") for row in queries):
            raise
    queries = [row for row in queries if (qrels.get(row["id"]) or row.get("answers"))
               and (of_file or not split or row.get("split") == split)]
    if not queries:
        raise ValueError(f"{directory}: no query{f' of split {split!r}' if split else ''} has a "
                         "judged document")
    if ignore_identical_ids is None:
        same = [row["id"] for row in queries if texts.get(row["id"]) == row["text"]
                and qrels.get(row["id"], {}).get(row["id"], 0) <= 0]
        if ignore_identical_ids := bool(same):
            warnings.warn(f"{directory}: {len(same)} queries are documents too, {same[0]!r} first; "
                          "each is left out of its own ranking (ignore_identical_ids=false keeps "
                          "them)", stacklevel=2)
    return Collection(directory.name, corpus, queries, qrels, of_file, ignore_identical_ids)
