"""Filters: each by hand, chains with their counts, near duplicates against exact Jaccard."""

import doctest
import json
import random
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from tools import filters
from data import read_jsonl
from tools.filters import (
    Decontaminator,
    FilterConfig,
    by_length,
    by_score,
    by_script,
    chain,
    exact_duplicates,
    joined,
    load_scorer,
    main,
    make_filters,
    minhash,
    mteb_rows,
    near_duplicates,
    texts_of,
    words_of,
)

LONG = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"


def run(one, rows, **keys):
    """Return (rows kept, [reason] of the others)."""
    reasons = []
    kept = list(one(rows, lambda row, reason: reasons.append(reason), **keys))
    assert len(kept) + len(reasons) == len(rows)
    return kept, reasons


def texts(*values):
    return [{"text": value} for value in values]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
                    encoding="utf-8")
    return str(path)


class Encoder:
    """Maps "0.3" to a vector, not of unit length, with cosine 0.3 to that of any other text."""

    def __init__(self):
        self.asked = []

    def encode(self, batch):
        self.asked.append(len(batch))
        cosines = np.array([float(t) if t[0].isdigit() else 1.0 for t in batch])
        return 5 * np.stack([cosines, np.sqrt(1 - cosines ** 2)], 1)


def test_documentation_examples():
    assert doctest.testmod(filters).failed == 0


# ---------------------------------------------------------------- one at a time

def test_texts_of_every_format():
    assert texts_of({"text": "a", "label": "b"}) == ["a"]
    assert texts_of({"instruction": "i", "input": "a", "output": "b"}) == ["a", "b"]
    assert texts_of({"sentence1": "a", "sentence2": "b", "score": 1}) == ["a", "b"]
    for row in ({"id": "x"}, {"query": 3, "pos": [None]}):
        with pytest.raises(ValueError, match="no text|string"):
            texts_of(row)


def test_length_holds_for_each_text_of_a_row():
    rows = [{"query": "ab", "pos": ["abcd"]}, {"query": "a", "pos": ["abcd"]},
            {"query": "ab", "pos": ["abcd", "abcde"]}]
    assert run(by_length, rows, low=2, high=4) == ([rows[0]], ["too short", "too long"])
    assert run(by_length, rows, low=2) == ([rows[0], rows[2]], ["too short"])


def test_script_share():
    rows = texts("用 numpy 排序", "排序用的方法 ok", "Sortieren", "12 + 3")
    assert run(by_script, rows, lang="zh", least=0.5) == ([rows[1]], ["script"] * 3)
    assert run(by_script, rows, lang="de", least=0.6)[0] == [rows[0], rows[2]]


def test_exact_duplicates_see_through_case_width_and_punctuation():
    rows = [*texts("Hello, world!", "hello WORLD", "Ｈello world", "hello  worlds"),
            {"query": "hello", "pos": ["world"]}, *texts("++", "--", "++")]
    kept, reasons = run(exact_duplicates, rows)
    assert kept == [rows[0], rows[3], rows[4], rows[5], rows[6]]
    assert reasons == ["exact duplicate"] * 3


def shingles(text):
    text = " ".join(words_of(text))
    return {text[i:i + 5] for i in range(len(text) - 4)}


def jaccard(a, b):
    a, b = shingles(a), shingles(b)
    return len(a & b) / len(a | b)


def sentences(rng, n):
    return [" ".join(rng.choices(LONG.split(), k=3)) + f" {rng.random():.6f}" for _ in range(n)]


def test_minhash_estimates_the_jaccard_overlap():
    rng, errors = random.Random(0), []
    for same in range(0, 41, 4):
        common = sentences(rng, same)
        a, b = (" ".join(common + sentences(rng, 40 - same)) for _ in range(2))
        errors.append((minhash(a) == minhash(b)).mean() - jaccard(a, b))
    assert len(minhash(a)) == 128 and np.abs(errors).max() < 0.13     # three standard errors
    assert abs(np.mean(errors)) < 0.04
    assert (minhash("") == minhash(" ")).all() and (minhash("Hi!") == minhash("hi")).all()


def test_near_duplicates_are_those_above_the_overlap():
    rng = random.Random(1)
    rows, near = [], 0
    for _ in range(40):
        parts = sentences(rng, 30)
        copy = parts[:-1] + sentences(rng, 1)
        other = parts[:15] + sentences(rng, 15)
        assert jaccard(" ".join(parts), " ".join(copy)) > 0.9
        assert jaccard(" ".join(parts), " ".join(other)) < 0.7
        rows += texts(" ".join(parts), " ".join(other), " ".join(copy))
    kept, reasons = run(near_duplicates, rows)
    assert reasons == ["near duplicate"] * 40
    assert kept == [row for i, row in enumerate(rows) if i % 3 != 2]


def test_score_of_pairs_with_the_edge_inside():
    rows = [{"input": "q", "output": "0.39", "instruction": "Find"},
            {"query": "q", "pos": ["0.41", "0.2", "0.9"], "neg": ["0.1"]},
            {"query": "q", "pos": "0.5"}, {"query": "q", "pos": ["0.1", "0.2"]},
            {"query": "q", "pos": ["0.1"], "score": 0.4}, {"input": "q", "score": 0.39}]
    for batch in (1, 2, 256):
        kept, reasons = run(by_score, rows, encoder=Encoder(), least=0.4, batch=batch)
        assert kept == [rows[1] | {"pos": ["0.41", "0.9"]}, rows[2], rows[4]]
        assert reasons == ["score"] * 3
    with pytest.raises(ValueError, match="'score'"):
        run(by_score, rows[:1], encoder=None)
    assert run(by_score, rows[4:], encoder=None) == ([rows[4]], ["score"])


def test_the_query_is_scored_with_its_instruction():
    seen = []

    class Listener(Encoder):
        def encode(self, batch):
            seen.extend(batch)
            return super().encode(batch)
    run(by_score, [{"query": "q", "pos": ["0.5"], "prompt": "Find"}], encoder=Listener())
    assert seen == ["Find: q", "0.5"]


# ---------------------------------------------------------------- evaluation texts

@pytest.mark.parametrize("text, reason", [
    (LONG.replace("one ", "").upper(), "13 words of an evaluation text"),
    (f"before, {LONG}; after", "13 words of an evaluation text"),
    (LONG.replace("seven", "7"), None),
    (" ".join(LONG.split()[:12]), None),
    ("what is, THE capital", "equal to an evaluation text"),
    ("what is the capital of", None),
    ("yes no", None),                                        # two words: equal by chance
    ("这里有一个很长的句子用来测试过滤器的重叠", "13 words of an evaluation text"),
    ("这里有一个很长的句子", None)])
def test_overlap(tmp_path, text, reason):
    path = write_jsonl(tmp_path / "e.jsonl", [
        {"query": LONG, "pos": ["what is the capital?", "yes no"]},
        {"sentence1": "前面这里有一个很长的句子用来测试过滤器", "label": "what is the capital of"}])
    clean = Decontaminator([path])
    assert clean.reason({"query": "q", "pos": [text]}) == reason
    assert clean.reason({"query": "q", "pos": ["p"], "neg": [text]}) is None


def test_a_folder_is_read_without_its_documents(tmp_path):
    (tmp_path / "set").mkdir()
    write_jsonl(tmp_path / "set" / "queries.jsonl", texts("the first query"))
    corpus = write_jsonl(tmp_path / "set" / "corpus.jsonl", texts("the first document"))
    row = {"text": "The first document."}
    assert Decontaminator([tmp_path]).reason({"text": "The first query"})
    assert Decontaminator([tmp_path]).reason(row) is None
    assert Decontaminator([corpus]).reason(row) == "equal to an evaluation text"
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no JSONL"):
        Decontaminator([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no evaluation text"):
        Decontaminator([write_jsonl(tmp_path / "ids.jsonl", [{"id": "a"}])])


# ---------------------------------------------------------------- chains, command line

def test_of_mteb_only_what_is_evaluated_on_counts(monkeypatch):
    """Not the rows to learn from, not the documents; subsets and plain splits alike."""
    def task(dataset, splits):
        return SimpleNamespace(dataset=dataset, metadata=SimpleNamespace(eval_splits=splits),
                               load_data=lambda: None, unload_data=lambda: None)
    row = {name: [{"id": "1", "text": f"{name} text here"}] for name in (
        "train", "test", "dev", "query", "document", "answers")}
    tasks = [task({"train": row["train"], "test": row["test"], "dev": row["dev"]}, ["test"]),
             task({"en": {"dev": row["dev"], "train": row["train"]}}, ["dev"]),
             task({"default": {"test": {"queries": row["query"], "corpus": row["document"],
                                        "relevant_docs": {"q": {"d": 1}}, "top_ranked": None}}},
                  ["test"])]
    monkeypatch.setattr("eval.mteb_tasks", lambda name: (tasks, name == "B"))
    assert [r["text"] for r in mteb_rows("B")] == [
        "test text here", "dev text here", "query text here"]
    clean = Decontaminator(["mteb:B"])
    assert clean.reason({"text": "Query, text: HERE"}) == "equal to an evaluation text"
    assert clean.reason({"text": "document text here"}) is None


def test_a_benchmarks_comma_is_put_back():
    assert joined(("a", "mteb:MTEB(eng", "v2)", "b")) == ["a", "mteb:MTEB(eng, v2)", "b"]
    assert joined(("a.jsonl",)) == ["a.jsonl"] and joined(()) == []


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
    monkeypatch.setattr("eval.mteb_tasks", lambda name: ([tasks[int(name)]], False))
    for number, task in enumerate(tasks):
        rows = list(mteb_rows(str(number)))
        texts = [text for row in rows for text in filters._strings(row)]
        assert rows and any(len(text.split()) >= 3 for text in texts), task.metadata.name
    assert {row["text"] for row in mteb_rows("0")} == {"This is a test sentence",
                                                       "This is another test sentence"}


def test_a_chain_counts_each_row_once():
    rows = texts("a", "a", "bbbb", "bbbb", "cc")
    reasons = []
    kept = list(chain(iter(rows), [lambda r, d: by_length(r, d, 2), exact_duplicates],
                      lambda row, reason: reasons.append((row["text"], reason))))
    assert kept == texts("bbbb", "cc")
    assert reasons == [("a", "too short"), ("a", "too short"), ("bbbb", "exact duplicate")]


def test_command_line(tmp_path, capsys):
    rows = [{"query": "what is a field", "pos": ["0.5"]},
            {"query": "What is a FIELD?", "pos": ["0.5"]},
            {"query": "q", "pos": ["0.5"]}, {"query": "in the evaluation set", "pos": ["0.5"]},
            {"query": "с другим письмом", "pos": ["0.5"]},
            {"query": "scored low by its own", "pos": ["0.5"], "score": 0.1},
            {"query": "scored high by its own", "pos": ["0.5"], "score": 0.7}]
    rows[:5] = [row | {"score": 0.9} for row in rows[:5]]
    source, out = write_jsonl(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    bad = write_jsonl(tmp_path / "eval.jsonl", texts("In the evaluation set"))
    main([f"--input={source}", f"--out={out}", f"--dropped={tmp_path / 'dropped.jsonl'}",
          "--min_chars=3", "--max_chars=100", "--script=en", "--dedup=near", "--min_score=0.4",
          f"--decontaminate={bad}"])
    assert list(read_jsonl(out)) == [rows[0], rows[6]]
    dropped = {"too short": 1, "script": 1, "exact duplicate": 1, "score": 1,
               "equal to an evaluation text": 1}
    report = json.loads((tmp_path / "new" / "out.jsonl.report.json").read_text())
    assert (report["read"], report["kept"], report["dropped"]) == (7, 2, dropped)
    aside = [row["reason"] for row in read_jsonl(tmp_path / "dropped.jsonl")]
    assert sorted(aside) == sorted(dropped)
    assert "2 of 7 rows" in capsys.readouterr().out
    assert sorted(p.name for p in out.parent.iterdir()) == ["out.jsonl", "out.jsonl.report.json"]


def test_what_was_there_stays_when_a_run_fails(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("before")
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "fine"}\n{"text": \n')
    with pytest.raises(ValueError, match="in.jsonl:2"):
        main([f"--input={source}", f"--out={out}", "--min_chars=1"])
    assert out.read_text() == "before"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("keys", [{"min_chars": 9, "max_chars": 3}, {"near": 0.0},
                                  {"min_script": 1.5}])
def test_settings_that_cannot_be(keys):
    with pytest.raises(ValueError):
        FilterConfig(("a",), "b", **keys)


def test_no_filter_unless_asked_and_cheap_ones_first():
    assert make_filters(FilterConfig(("a",), "b")) == []
    made = make_filters(FilterConfig(("a",), "b", min_chars=1, script="zh", dedup="near",
                                     min_score=0.4))
    assert [getattr(f, "func", f) for f in made] == [by_length, by_script, exact_duplicates,
                                                     near_duplicates, by_score]


def test_a_folder_of_ours_is_an_embedder(tmp_path):
    with pytest.raises(FileNotFoundError, match="no checkpoint here"):
        load_scorer(tmp_path)


def test_any_other_model_is_left_to_sentence_transformers(tmp_path, monkeypatch):
    stand_in = SimpleNamespace(SentenceTransformer=lambda path: ("loaded", str(path)))
    monkeypatch.setitem(sys.modules, "sentence_transformers", stand_in)
    assert load_scorer("org/name") == ("loaded", "org/name")
    (tmp_path / "modules.json").write_text("[]")
    assert load_scorer(tmp_path) == ("loaded", str(tmp_path))
    (tmp_path / "nanoconan.json").write_text("{}")             # one that export.py wrote
    with pytest.raises(ValueError, match="nanoconan.json"):
        load_scorer(tmp_path)
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        load_scorer("org/name")
