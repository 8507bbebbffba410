"""Filters: each by hand, chains with their counts, what mteb evaluates on."""
import gzip
import json
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest

from engine.jsonl import read_jsonl
from ranks import write_lines
from tools import filters
from tools.filters import (by_score, decontaminate, exact_duplicates, main, mteb_rows, texts_of,
                           words_of)

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def run(one, rows, **keys):
    """Return (rows kept, {reason: how many of the others})."""
    counts = Counter()
    kept = list(one(rows, counts, **keys))
    assert len(kept) + counts.total() == len(rows)
    return kept, counts


def texts(*values):
    return [{"text": value} for value in values]


def reason(row, *paths):
    """Return why a row overlaps the evaluation texts of these files, or None."""
    return next(iter(run(decontaminate, [row], paths=paths)[1]), None)


class Scorer:
    """Map "0.3" to a vector with cosine 0.3 to that of any query."""

    def __init__(self, name, trust_remote_code=None):
        assert name == "x" and trust_remote_code is None

    def encode(self, texts, prompt):
        assert prompt in (("query", None), ("document", None))
        cosines = np.array([1.0 if prompt[0] == "query" else float(text) for text in texts])
        return np.stack([cosines, np.sqrt(1 - cosines ** 2)], 1)


# ---------------------------------------------------------------- one at a time

def test_texts_of_every_format():
    assert texts_of({"text": "a", "label": "b"}) == ["a"]
    assert texts_of({"title": "t", "text": "a", "id": "b"}) == ["t", "a"]
    assert texts_of({"instruction": "i", "input": "a", "output": "b"}) == ["a", "b"]
    assert texts_of({"instruction": "i", "input": "", "output": "b"})[0] == "i"     # the query
    assert texts_of({"sentence1": "a", "sentence2": "b", "score": 1}) == ["a", "b"]
    for row in ({"id": "x"}, {"query": 3, "pos": [None]}):
        with pytest.raises(ValueError, match="no text|string"):
            texts_of(row)


def test_exact_duplicates_see_through_case_width_and_punctuation():
    rows = [*texts("Hello, world!", "hello WORLD", "Ｈello world", "hello  worlds"),
            {"query": "hello", "pos": ["world"]}, *texts("++", "--", "++", "...")]
    kept, counts = run(exact_duplicates, rows)
    other = [*texts("C++ guide", "C# guide", "C guide", "x = 1", "x = -1", "3 + 4"),
             *({"text": "so so", "label": label} for label in "ab"),
             *({"instruction": word, "input": "x", "output": "y"} for word in ("Put", "Say"))]
    assert run(exact_duplicates, other)[0] == other
    assert kept == [rows[0], rows[3], rows[4], rows[5], rows[6], rows[8]]
    assert counts == {"exact duplicate": 3}


@pytest.mark.parametrize("a, b", [("वह लड़का है", "वह लड़की है"),      # he is a boy, she a girl
                                  ("เขามา", "เขามี")])
def test_marks_belong_to_words(a, b):
    assert run(exact_duplicates, texts(a, b))[0] == texts(a, b)
    assert words_of(a) != words_of(b)


def test_decomposed_text_is_the_same_text():
    assert words_of("Cafe\u0301") == words_of("Café") == ["café"]


def test_score_of_pairs_with_the_edge_inside():
    rows = [{"input": "q", "output": "0.39", "instruction": "Find"},
            {"query": "q", "pos": ["0.41", "0.2", "0.4"], "neg": ["0.1"],
             "pos_cosines": [0.4, 0.3, 0.5]},
            {"query": "q", "pos": "0.4"}, {"query": "q", "pos": ["0.1", "0.2"]}]
    for batch in (1, 2, 256):
        good, counts = run(by_score, rows, scorer=Scorer("x"), least=0.4, batch=batch)
        assert good == [rows[1] | {"pos": ["0.41", "0.4"], "pos_cosines": [0.4, 0.5]}, rows[2]]
        assert counts == {"score": 2}


@pytest.mark.parametrize("row, scores, message", [
    ({"query": "q", "text": "t"}, True, r"in\.jsonl:2: key 'pos' is missing; .*'query', 'text'"),
    ({"query": "q", "pos": [3]}, True, r"in\.jsonl:2: "),
    ({"id": "x"}, False, r"in\.jsonl:2: no text in a row")])
def test_a_row_that_cannot_be_read_is_named_by_line(tmp_path, monkeypatch, row, scores, message):
    monkeypatch.setattr(filters, "SentenceTransformerBaseline", Scorer)
    path = write_lines(tmp_path / "in.jsonl", [{"query": "q", "pos": ["0.5"]}, row])
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    with pytest.raises(ValueError, match=message):
        main([f"--input={path}", f"--out={out}",
              *(["--min_score=0.4", "--scorer=x"] if scores else ["--dedup"])])
    assert out.read_text() == "before"                 # and nothing else is left behind
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


# ---------------------------------------------------------------- evaluation texts

@pytest.mark.parametrize("text, expected", [
    (LONG.replace("one ", "").upper(), "overlaps an evaluation text"),
    (f"before, {LONG}; after", "overlaps an evaluation text"),
    (LONG.replace("seven", "7"), None),
    (" ".join(LONG.split()[:12]), None),
    ("what is, THE capital", "overlaps an evaluation text"),
    ("name its largest river", "overlaps an evaluation text"),
    ("what is the capital of", None),
    ("yes no", None),                                        # two words: equal by chance
    ("这里有一个很长的句子用来测试过滤器的重叠", "overlaps an evaluation text"),
    ("这里有一个很长的句子", None)])
def test_overlap(tmp_path, text, expected):
    path = write_lines(tmp_path / "e.jsonl", [
        {"query": LONG, "pos": ["what is the capital?", "yes no"]},
        {"sentence1": "前面这里有一个很长的句子用来测试过滤器", "label": "what is the capital of"},
        {"instruction": "Name its largest river", "input": "", "output": ""}])
    assert reason({"query": "q", "pos": [text]}, path) == expected
    assert reason({"query": "q", "pos": ["p"], "neg": [text]}, path) is None


def test_a_folder_is_read_without_its_documents(tmp_path):
    (tmp_path / "set").mkdir()
    write_lines(tmp_path / "set" / "queries.jsonl", texts("the first query"))
    corpus = write_lines(tmp_path / "set" / "corpus.jsonl", texts("the first document"))
    row = {"text": "The first document."}
    assert reason({"text": "The first query"}, tmp_path) == "overlaps an evaluation text"
    assert reason(row, tmp_path) is None
    assert reason(row, tmp_path, corpus) == "overlaps an evaluation text"
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty: no evaluation text"):
        reason(row, corpus, tmp_path / "empty")
    with pytest.raises(ValueError, match="ids.jsonl: no evaluation text"):
        reason(row, write_lines(tmp_path / "ids.jsonl", [{"id": "a"}]))


# ---------------------------------------------------------------- chains, command line

def test_of_mteb_only_what_is_evaluated_on_counts(monkeypatch):
    """Not the rows to learn from, not the documents; subsets and plain splits alike."""
    def task(dataset, splits):
        return SimpleNamespace(dataset=dataset, metadata=SimpleNamespace(eval_splits=splits),
                               load_data=lambda: None, unload_data=lambda: None)
    row = {name: [{"id": "1", "text": f"{name} text here"}] for name in (
        "train", "test", "dev", "query", "document", "answers")}
    tasks = [task({"train": row["train"], "test": row["test"], "dev": row["dev"]}, ["test"]),
             task({"en": {"dev": row["dev"], "train": row["train"], "test": row["test"]}}, ["dev"]),
             task({"default": {"test": {"queries": row["query"], "corpus": row["document"],
                                        "relevant_docs": {"q": {"d": 1}}, "top_ranked": None}}},
                  ["test"])]
    names = []
    monkeypatch.setattr(filters, "mteb_tasks", lambda name: names.append(name) or (tasks, True))
    assert [r["text"] for r in mteb_rows("B")] == [
        "test text here", "dev text here", "query text here"]
    benchmark = ("mteb:MTEB(eng", "v2)")               # as the command line splits it
    assert reason({"text": "Query, text: HERE"}, *benchmark) == "overlaps an evaluation text"
    assert reason({"text": "document text here"}, *benchmark) is None
    assert names == ["B", "MTEB(eng, v2)", "MTEB(eng, v2)"]


@pytest.mark.extras
def test_mtebs_own_tasks_are_read(monkeypatch):
    """Its mock tasks have every shape of data that its text tasks have."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    pytest.importorskip("mteb", minversion="2")
    from mteb.mocks import mock_tasks

    tasks = [getattr(mock_tasks, f"Mock{name}")() for name in (
        "RetrievalTask", "MultilingualRetrievalTask", "STSTask", "MultilingualSTSTask",
        "ClassificationTask", "SummarizationTask", "PairClassificationTask", "RerankingTask",
        "BitextMiningTask", "MultilingualParallelBitextMiningTask")]
    monkeypatch.setattr(filters, "mteb_tasks", lambda name: ([tasks[int(name)]], False))
    whole = SimpleNamespace(tasks=[mock_tasks.MockRetrievalTask()])        # as CQADupstack
    tasks.append(whole)
    for number, task in enumerate(tasks[:-1]):
        rows = list(mteb_rows(str(number)))
        texts = list(filters._strings(rows))
        assert rows and any(len(text.split()) >= 3 for text in texts), task.metadata.name
    assert {row["text"] for row in mteb_rows("0")} == {"This is a test sentence",
                                                       "This is another test sentence"}
    assert list(mteb_rows(str(tasks.index(whole)))) == list(mteb_rows("0"))

    old = mock_tasks.MockRetrievalTask()                   # as LEMBNarrativeQARetrieval
    monkeypatch.setattr(old, "load_data", lambda: None)
    old.queries, old.corpus, old.relevant_docs = ({"test": rows} for rows in (
        {"q": "what is asked"}, {"d": "what is read"}, {"q": {"d": 1}}))
    tasks.append(old)
    assert {row["text"] for row in mteb_rows(str(len(tasks) - 1))} == {"what is asked"}


def test_command_line(tmp_path, capsys, monkeypatch):
    rows = [{"query": "what is a field", "pos": ["0.5"]},
            {"query": "What is a FIELD?", "pos": ["0.5"]},
            {"query": "in the evaluation set", "pos": ["0.5"]},
            {"query": "scored low", "pos": ["0.1"]}, {"query": "scored high", "pos": ["0.7"]}]
    monkeypatch.setattr(filters, "SentenceTransformerBaseline", Scorer)
    source, out = write_lines(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    bad = write_lines(tmp_path / "eval.jsonl", texts("In the evaluation set"))
    main([f"--input={source}", f"--out={out}", "--dedup", "--min_score=0.4", "--scorer=x",
          f"--decontaminate={bad}"])
    assert list(read_jsonl(out)) == [rows[0], rows[4]]
    dropped = {"exact duplicate": 1, "score": 1, "overlaps an evaluation text": 1}
    report = json.loads((tmp_path / "new" / "out.jsonl.report.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (5, 2, dropped)
    assert "2 of 5 rows" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_a_call_without_a_filter_is_a_mistake():
    with pytest.raises(ValueError, match="no filter: give --dedup, --decontaminate or --min_score"):
        filters.FilterConfig(input=("a.jsonl",), out="b.jsonl")


def test_a_folder_is_read_in_every_form(tmp_path):
    lines = json.dumps({"text": "the first query"}).encode()
    for name in ("a.jsonl", "a.ndjson", "a.jsonl.gz", "a.ndjson.gz"):
        folder = tmp_path / name / "deep"
        folder.mkdir(parents=True)
        (folder / name).write_bytes(gzip.compress(lines) if name.endswith("gz") else lines)
        assert reason({"text": "The first query"}, tmp_path / name), name
