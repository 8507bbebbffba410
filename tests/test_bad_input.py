"""Hundreds of malformed inputs: each is named by file, line and reason, or skipped and counted.

What may come out of a bad file is ValueError or OSError with the file's name in it; an error from
inside (KeyError, RecursionError, UnicodeDecodeError ...) or a silent result fails the test.
"""
import gzip
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import data
import embed
import eval as evaluation
import train
from configurator import load_config
from engine import checkpoint
from tasks import LexicalBaseline
from tokenizer import HEADER, Tokenizer

ROOT = Path(train.__file__).parent
GOOD = {
    "text": {"text": "a text"},
    "pairs": {"instruction": "do", "input": "q", "output": "p"},
    "retrieval": {"query": "q", "pos": ["p"], "neg": ["n"], "prompt": "find"},
    "clr": {"query": "q", "pos": ["p"]},
    "classification": {"query": "q", "pos": ["label"], "neg": ["other"]},
    "sts": {"sentence1": "a", "sentence2": "b", "score": 2.5},
}


def as_line(row):
    return json.dumps(row).encode()


def assert_clear(error, *parts):
    """The error is for a person: of the right kind, not an accident, and it says where."""
    assert isinstance(error, (ValueError, OSError)), repr(error)
    assert not isinstance(error, UnicodeError), repr(error)
    text = str(error)
    for part in parts:
        assert str(part) in text, f"{part!r} is not in {text[:500]!r}"
    assert len(text) < 2000, "the file itself is in the message"


# ---------------------------------------------------------------- lines that no format takes

BAD_JSON = {                           # a line -> the reason that the error gives
    b"": "blank line",
    b"   \t ": "blank line",
    b"{": "not JSON",
    b"}": "not JSON",
    b"{}}": "not JSON",
    b"{]": "not JSON",
    b"[": "not JSON",
    b'{"text"': "not JSON",
    b'{"text":': "not JSON",
    b'{"text": ': "not JSON",
    b'{"text": "a': "not JSON",
    b'{"text": "a"': "not JSON",
    b'{"text": "a",}': "not JSON",
    b'{"text": "a",,}': "not JSON",
    b'{"text" "a"}': "not JSON",
    b'{"text"= "a"}': "not JSON",
    b"{'text': 'a'}": "not JSON",
    b'{text: "a"}': "not JSON",
    b'{"text": "a"} {"text": "b"}': "not JSON",
    b'{"text": "a"}{"text": "b"}': "not JSON",
    b'{"text": "a"} # a comment': "not JSON",
    b'// a comment': "not JSON",
    b'{"text": "a" /* a comment */}': "not JSON",
    b'{"text": "\\x41"}': "not JSON",
    b'{"text": "\\u12"}': "not JSON",
    b'{"text": "\\uZZZZ"}': "not JSON",
    b'{"text": "a\\"}': "not JSON",
    b'{"text": "a\tb"}': "not JSON",
    b'{"text": "a\x00b"}': "not JSON",
    b'\x00{"text": "a"}': "not JSON",
    b'{"text": "a"}\x00': "not JSON",
    b"\x00" * 50: "not JSON",
    b'{"text": 01}': "not JSON",
    b'{"text": +1}': "not JSON",
    b'{"text": 0x10}': "not JSON",
    b'{"text": .5}': "not JSON",
    b'{"text": True}': "not JSON",
    b'{"text": None}': "not JSON",
    b'{"text": undefined}': "not JSON",
    b'{"text": NaN}': "NaN is not a JSON number",
    b'{"text": Infinity}': "Infinity is not a JSON number",
    b'{"text": -Infinity}': "-Infinity is not a JSON number",
    b'{"text": ' + b"9" * 5000 + b"}": "",
    b'{"text": "a", "text": "b"}': "a key comes twice",
    b'{"text": "a", "more": {"x": 1, "x": 2}}': "a key comes twice",
    b"text,score": "not JSON",
    b"a\tb\tc": "not JSON",
    b"<html><body>404 Not Found</body></html>": "not JSON",
    b"version https://git-lfs.github.com/spec/v1": "not JSON",
    b"PK\x03\x04 a zip file": "not JSON",
    b"\x1f\x8b\x08\x00 a gzip file without its suffix": "not UTF-8",
    b"\x89PNG": "not UTF-8",
    b"\xff\xfe{\x00}\x00": "not UTF-8",                      # UTF-16
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\xe9t\xe9"}': "not UTF-8",                   # Latin-1
    b'{"text": "\xc0\xaf"}': "not UTF-8",                    # an overlong slash
    b'{"text": "\xed\xa0\x80"}': "not UTF-8",                # a surrogate as bytes
    b'{"text": "\xf4\x90\x80\x80"}': "not UTF-8",            # beyond U+10FFFF
    b'{"text": "\xe4\xbd"}': "not UTF-8",                    # a character cut in two
    b"\xef\xbb\xbf": "blank line",                           # a byte order mark alone
    b"null": "a JSON object is needed, not NoneType",
    b"true": "a JSON object is needed, not bool",
    b"3": "a JSON object is needed, not int",
    b"-0.5e3": "a JSON object is needed, not float",
    b'"a string"': "a JSON object is needed, not str",
    b"[]": "a JSON object is needed, not list",
    b'[{"text": "a"}]': "a JSON object is needed, not list",
    b"[" * 100_000: "nested too deeply",
    b'{"text": ' * 50_000: "nested too deeply",
    b'{"text": ' + b"[" * 100_000 + b"]" * 100_000 + b"}": "nested too deeply",
    b'{"text": "' + b"x" * 10_000_000: "not JSON",           # 10 MB without an end
    b"y" * 10_000_000: "not JSON",
}

# ---------------------------------------------------------------- objects that a format refuses

NOT_A_STRING = (None, True, 3, 1.5, [], ["a"], {}, {"a": "b"})
EMPTY = ("", " ", "\t\n", "\u00a0", "\u2003")
NOT_STRINGS = (None, True, 3, {}, [None], [3], ["a", 4], [["a"]], [""], ["a", " "], [{}])


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


def refused_rows():
    """Yield (kind, row): every key of every format missing, of every wrong type, and empty."""
    for kind, row in GOOD.items():
        yield kind, {}
        yield kind, {"unknown": "key"}
        for key in row.keys() - {"neg", "prompt", "instruction", "score", "pos"}:
            yield kind, without(row, key)
            for value in NOT_A_STRING + EMPTY:
                if not (kind == "pairs" and key == "input" and value is None):
                    yield kind, {**row, key: value}
        if "pos" in row:
            yield kind, without(row, "pos")
            for value in NOT_STRINGS + ([], *EMPTY):
                yield kind, {**row, "pos": value}
            for value in NOT_STRINGS[1:]:
                if value:                          # no negatives are no mistake
                    yield kind, {**row, "neg": value}
        for key in row.keys() & {"prompt", "instruction"}:
            for value in NOT_A_STRING[1:]:
                yield kind, {**row, key: value}
    for value in (None, True, "4", [], {}, 10 ** 400, -10 ** 400, 1e39, -1e300):
        yield "sts", {**GOOD["sts"], "score": value}
    yield "sts", without(GOOD["sts"], "score")


REFUSED = [(kind, json.loads(row)) for kind, row in dict.fromkeys(
    (kind, json.dumps(row)) for kind, row in refused_rows())]
BAD_SCORES = (b"NaN", b"Infinity", b"-Infinity", b"1e400", b"nan", b'"NaN"', b"1,5", b"1e")


def test_there_are_hundreds_of_them(record):
    kinds = (BAD_JSON, REFUSED, BAD_SCORES, BAD_FILES, BAD_COLLECTIONS, BAD_EVALUATIONS,
             BAD_HEADERS, BAD_RANKS, BAD_METAS, BAD_SAFETENSORS, BAD_SETTINGS, BAD_CONFIGS)
    record["malformed inputs"] = sum(map(len, kinds))
    assert len(REFUSED) > 200 and record["malformed inputs"] > 500


@pytest.mark.parametrize("line, reason", BAD_JSON.items(), ids=range(len(BAD_JSON)))
def test_broken_lines(tmp_path, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(as_line(GOOD["text"]) + b"\n" + line + b"\n" + as_line(GOOD["text"]) + b"\n")
    for read in (lambda: list(data.read_jsonl(path)),
                 lambda: data.JsonlFile(path, "text", tmp_path)):
        with pytest.raises(Exception) as caught:
            read()
        assert_clear(caught.value, f"{path}:2: ", reason)
    found = []
    rows = list(data.read_jsonl(path, skip_bad=True, on_bad=found.append))
    assert len(rows) == 2 and len(found) == 1 and reason in found[0]
    rows = data.JsonlFile(path, "text", tmp_path, skip_bad=True)
    assert (len(rows), rows.bad, rows[1]) == (2, 1, "a text")


@pytest.mark.parametrize("kind", GOOD)
def test_refused_rows_one_by_one(tmp_path, kind):
    bad = [row for k, row in REFUSED if k == kind]
    for number, row in enumerate(bad):
        path = tmp_path / f"{number}.jsonl"
        path.write_bytes(as_line(GOOD[kind]) + b"\n" + as_line(row) + b"\n")
        try:
            data.JsonlFile(path, kind, tmp_path)
        except Exception as error:
            assert_clear(error, f"{path}:2: ", "key" if "prompt" not in str(error) else "prompt")
        else:
            raise AssertionError(f"taken: {row}")
    path = tmp_path / "all.jsonl"
    path.write_bytes(b"\n".join(map(as_line, [*bad, GOOD[kind]])))
    rows = data.JsonlFile(path, kind, tmp_path, skip_bad=True)
    assert (len(rows), rows.bad) == (1, len(bad))


@pytest.mark.parametrize("score", BAD_SCORES)
def test_scores_that_are_no_numbers(tmp_path, score):
    path = tmp_path / "sts.jsonl"
    path.write_bytes(b'{"sentence1": "a", "sentence2": "b", "score": ' + score + b"}\n")
    with pytest.raises(ValueError, match="sts.jsonl:1: "):
        data.JsonlFile(path, "sts", tmp_path)


# ---------------------------------------------------------------- odd, but meant

ODD_TEXTS = ["\ufeffmark", "a\u0000b", "\u202eright to left", "e\u0301", "👩‍👩‍👧", "\uffff",
             "<|endoftext|>", "<|pad|>", "<|endoftext|><|endoftext|>", "</s><s>[INST]", "<mask>",
             "../../etc/passwd", "C:\\con", "'; DROP TABLE x; --", "${HOME} $(reboot) `reboot`",
             "%s %d {0} {x}", "\r", "a\u2028b\u2029c\u0085d", "\x1b[2J", "ﷺ" * 50]


@pytest.mark.parametrize("text", ODD_TEXTS)
def test_odd_texts_come_through_unchanged(tmp_path, text):
    path = tmp_path / "rows.jsonl"
    for ascii_only in (True, False):
        if not (text.strip() or ascii_only):
            continue
        row = {"sentence1": f"x{text}", "sentence2": text + "y", "score": 1}
        path.write_text(json.dumps(row, ensure_ascii=ascii_only) + "\n", "utf-8", newline="")
        got = data.JsonlFile(path, "sts", tmp_path / str(ascii_only))[0]
        assert (got["sentence1"], got["sentence2"]) == (row["sentence1"], row["sentence2"])


def test_special_tokens_in_a_text_are_ordinary_text():
    tokenizer = Tokenizer.train(ODD_TEXTS * 3, 300)
    for text in ODD_TEXTS:
        ids = tokenizer.encode(text)
        assert tokenizer.eos_id not in ids and tokenizer.pad_id not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("escaped, text", [(rb"a\ud800b", "a?b"), (rb"\udfffx", "?x"),
                                           (rb"\uD83D\uDE00", "😀"), (rb"\uDE00\uD83D", "??"),
                                           (rb"\\ud800", r"\ud800")])
def test_lone_surrogates_become_question_marks(tmp_path, escaped, text):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"query": "' + escaped + b'", "pos": ["' + escaped + b'"], "prompt": "'
                     + escaped + b'"}\n')
    row = data.JsonlFile(path, "retrieval", tmp_path)[0]
    assert row == {"query": text, "pos": [text], "neg": [], "prompt": text}
    text.encode()


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n{"text": "b"}\r\n')
    rows = data.JsonlFile(path, "text", tmp_path)
    assert [rows[0], rows[1]] == ["a", "b"] == [r["text"] for r in data.read_jsonl(path)]


def test_a_line_of_10_mb_is_read(tmp_path):
    path, text = tmp_path / "rows.jsonl", "word " * 2_000_000
    path.write_bytes(as_line({"text": text}) + b"\n" + as_line({"text": "b"}) + b"\n")
    rows = data.JsonlFile(path, "text", tmp_path)
    assert (rows[0], rows[1]) == (text, "b")


# ---------------------------------------------------------------- files

WHOLE_GZ = gzip.compress(b"".join(b'{"text": "number %d"}\n' % i for i in range(3000)))


def flipped(at):
    broken = bytearray(WHOLE_GZ)
    broken[at] ^= 0xFF
    return bytes(broken)


BAD_FILES = {
    "empty.jsonl": b"",
    "newlines.jsonl": b"\n\n\n",
    "empty.jsonl.gz": b"",
    "empty_inside.jsonl.gz": gzip.compress(b""),
    "not_gz.jsonl.gz": b'{"text": "a"}\n',
    "head_only.jsonl.gz": WHOLE_GZ[:5],
    "head.jsonl.gz": WHOLE_GZ[:10],
    "half.jsonl.gz": WHOLE_GZ[:len(WHOLE_GZ) // 2],
    "no_trailer.jsonl.gz": WHOLE_GZ[:-8],
    "one_byte_less.jsonl.gz": WHOLE_GZ[:-1],
    "method.jsonl.gz": flipped(2),
    "deflate.jsonl.gz": flipped(len(WHOLE_GZ) // 2),
    "first_block.jsonl.gz": flipped(12),
    "crc.jsonl.gz": flipped(len(WHOLE_GZ) - 8),
    "length.jsonl.gz": flipped(len(WHOLE_GZ) - 1),
    "rubbish_behind.jsonl.gz": WHOLE_GZ + b"rubbish",
    "zeros.jsonl.gz": bytes(100),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_broken_files(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BAD_FILES[name])
    for skip in (False, True):                     # what cannot be read cannot be skipped either
        with pytest.raises(Exception) as caught:
            data.JsonlFile(path, "text", tmp_path / "cache", skip_bad=skip)
        assert_clear(caught.value, path)
    assert not list((tmp_path / "cache").glob("*"))            # no half of an index is left
    if ".gz" in name and name not in ("empty_inside.jsonl.gz", "empty.jsonl.gz"):
        with pytest.raises(Exception) as caught:
            list(data.read_jsonl(path))
        assert_clear(caught.value, path)


def test_paths_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    (tmp_path / "gone.jsonl").symlink_to("nowhere")
    for name in ("pipe.jsonl", "folder.jsonl", "loop.jsonl", "gone.jsonl", "none.jsonl",
                 "../" * 40 + "etc/no_such_file", "x" * 300):
        path = tmp_path / name
        for read in (lambda: data.JsonlFile(path, "text", tmp_path),
                     lambda: list(data.read_jsonl(path))):
            with pytest.raises(OSError) as caught:
                read()
            assert_clear(caught.value, path.name)
    with pytest.raises(ValueError, match="kind 'tables' is unknown"):
        data.JsonlFile(tmp_path / "x", "tables")


@pytest.mark.parametrize("damage", [lambda raw: b"", lambda raw: raw[:-5], lambda raw: raw[:16],
                                    lambda raw: raw + bytes(16), lambda raw: bytes(len(raw))])
@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_a_damaged_index_is_made_again(tmp_path, damage, suffix):
    path, lines = tmp_path / f"rows.{suffix}", b'{"text": "a"}\n{"text": "b"}\n'
    path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    data.JsonlFile(path, "text", tmp_path / "cache")
    index, = (tmp_path / "cache").glob("*.idx")
    index.write_bytes(damage(index.read_bytes()))
    rows = data.JsonlFile(path, "text", tmp_path / "cache")
    assert [rows[i] for i in range(len(rows))] == ["a", "b"]


def test_a_file_that_changes_while_it_is_used_is_noticed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "aaa"}\n{"text": "bbb"}\n')
    rows = data.JsonlFile(path, "text", tmp_path)
    path.write_bytes(b'{"text": "a longer one"}\n{"text": "b"}\n')
    with pytest.raises(ValueError, match="rows.jsonl:2: changed while in use"):
        rows[1]


# ---------------------------------------------------------------- collections

COLLECTION = {"corpus.jsonl": b'{"id": "d", "text": "a"}\n{"id": "e", "text": "b"}\n',
              "queries.jsonl": b'{"id": "q", "text": "a"}\n',
              "qrels.tsv": b"query-id\tcorpus-id\tscore\nq\td\t1\n"}
BAD_COLLECTIONS = [                    # file, its content (None: missing), what the error says
    ("corpus.jsonl", None, "no such file"),
    ("queries.jsonl", None, "no such file"),
    ("qrels.tsv", None, "no such file"),
    ("corpus.jsonl", b"", "qrels.tsv:2: "),
    ("queries.jsonl", b"", "qrels.tsv:2: "),
    ("qrels.tsv", b"", "no query"),
    ("qrels.tsv", b"query-id\tcorpus-id\tscore\n", "no query"),
    ("corpus.jsonl", b'{"text": "a"}\n', "corpus.jsonl:1: "),
    ("corpus.jsonl", b'{"id": 3, "text": "a"}\n', "corpus.jsonl:1: id 3"),
    ("corpus.jsonl", b'{"id": null, "text": "a"}\n', "corpus.jsonl:1: "),
    ("corpus.jsonl", b'{"id": ["d"], "text": "a"}\n', "corpus.jsonl:1: "),
    ("corpus.jsonl", b'{"id": "d"}\n', "corpus.jsonl:1: key 'text' is missing"),
    ("corpus.jsonl", b'{"id": "d", "text": null}\n', "key 'text' must be str"),
    ("corpus.jsonl", b'{"id": "d", "text": "a", "title": 7}\n', "key 'title' must be str"),
    ("corpus.jsonl", b'{"id": "d", "text": "a", "lang": ["en"]}\n', "key 'lang' must be str"),
    ("corpus.jsonl", COLLECTION["corpus.jsonl"] * 2, "corpus.jsonl:3: id 'd'"),
    ("corpus.jsonl", b'\xff\n', "corpus.jsonl:1: not UTF-8"),
    ("queries.jsonl", COLLECTION["queries.jsonl"] * 2, "queries.jsonl:2: id 'q'"),
    ("queries.jsonl", b'{"id": "q", "text": 3}\n', "queries.jsonl:1: key 'text'"),
    ("queries.jsonl", b'{"id": "q", "text": "a", "split": {}}\n', "key 'split' must be str"),
    ("queries.jsonl", b'{"id": "q", "text": "a", "split": 1}\n', "key 'split' must be str"),
    ("queries.jsonl", b'{"id": "other", "text": "a"}\n', "unknown query 'q'"),
    ("qrels.tsv", b"nobody\td\t1\n", "qrels.tsv:1: unknown query 'nobody'"),
    ("qrels.tsv", b"q\tnothing\t1\n", "unknown document 'nothing'"),
    ("qrels.tsv", b"d\tq\t1\n", "qrels.tsv:1: unknown"),
    ("qrels.tsv", b"q d 1\n", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"q\n", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"\n", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"q\td\n", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"q\td\t\n", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"q\td\tyes\n", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"q\td\tnan\n", "the score nan is not finite"),
    ("qrels.tsv", b"q\td\tinf\n", "the score inf is not finite"),
    ("qrels.tsv", b"q\td\t-inf\n", "the score -inf is not finite"),
    ("qrels.tsv", b"q\td\t1e999\n", "is not finite"),
    ("qrels.tsv", b"q\td\t1\nq\td\t0\n", "qrels.tsv:2: query 'q' and document 'd' have two"),
    ("qrels.tsv", b"q\td\t1\n\xff\te\t1\n", "qrels.tsv:2: not UTF-8"),
    ("qrels.tsv", b"\x00\x00\x00", "qrels.tsv:1: query-id"),
    ("qrels.tsv", b"q\td\t1\n" + b"x" * 10_000_000, "qrels.tsv:2: query-id"),
]


def write_collection(folder, name=None, content=None):
    folder.mkdir(exist_ok=True)
    for other, right in COLLECTION.items():
        if other != name:
            (folder / other).write_bytes(right)
        elif content is not None:
            (folder / other).write_bytes(content)
    return folder


@pytest.mark.parametrize("name, content, reason", BAD_COLLECTIONS,
                         ids=range(len(BAD_COLLECTIONS)))
def test_broken_collections(tmp_path, name, content, reason):
    folder = write_collection(tmp_path / "set", name, content)
    with pytest.raises(Exception) as caught:
        data.load_collection(folder)
    assert_clear(caught.value, folder, reason)


@pytest.mark.parametrize("name", COLLECTION)
def test_collections_cut_short_in_their_gz(tmp_path, name):
    folder = write_collection(tmp_path / "set", name)
    packed = gzip.compress(COLLECTION[name] + b"\n" * 3000 + os.urandom(3000).hex().encode())
    broken = bytearray(packed)
    broken[len(packed) // 2] ^= 0xFF
    for raw in (packed[:30], packed[:-4], bytes(broken), b"rubbish"):
        (folder / f"{name}.gz").write_bytes(raw)
        with pytest.raises(Exception) as caught:
            data.load_collection(folder)
        assert_clear(caught.value, f"{name}.gz:")


def test_odd_collections_are_read(tmp_path):
    folder = write_collection(tmp_path / "set")
    right = data.load_collection(folder)
    for name, content in COLLECTION.items():       # Windows: mark and line ends
        (folder / name).write_bytes(b"\xef\xbb\xbf" + content.replace(b"\n", b"\r\n"))
    assert data.load_collection(folder) == right
    for text in ("../../x", "/etc/passwd", "a\u0000b", "x" * 10_000, "-1", " "):
        rows = json.dumps({"id": text, "text": "a"}).encode()
        (folder / "corpus.jsonl").write_bytes(rows)
        (folder / "qrels.tsv").write_bytes(f"q\t{text}\t1\n".encode())
        assert data.load_collection(folder).qrels == {"q": {text: 1.0}}      # ids are only keys


# ---------------------------------------------------------------- rows that are evaluated

BAD_EVALUATIONS = [
    ("sts", b'{"sentence1": "a", "sentence2": "b"}', "key 'score' is missing"),
    ("sts", b'{"sentence1": "a", "sentence2": "b", "score": "5"}', "must be int or float"),
    ("sts", b'{"sentence1": "a", "sentence2": "b", "score": NaN}', "NaN is not a JSON number"),
    ("sts", b'{"sentence1": "a", "sentence2": "b", "score": 1, "lang": 3}', "key 'lang'"),
    ("sts", b'{"sentence1": "a", "sentence2": "b", "score": 1, "split": ["test"]}', "key 'split'"),
    ("sts", b"", "blank line"),
    ("pair_classification", b'{"sentence1": "a", "sentence2": "b", "label": 2}', "0 or 1"),
    ("pair_classification", b'{"sentence1": "a", "sentence2": "b", "label": true}', "'label'"),
    ("reranking", b'{"query": "a", "pos": "b", "neg": ["c"]}', "key 'pos' must be list"),
    ("retrieval", b'', "no such file"),
]


@pytest.mark.parametrize("task, line, reason", BAD_EVALUATIONS, ids=range(len(BAD_EVALUATIONS)))
def test_broken_evaluation_files(tmp_path, task, line, reason):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(line + b"\n")
    with pytest.raises(Exception) as caught:
        evaluation.evaluate(LexicalBaseline(), task, path)
    assert_clear(caught.value, reason)


# ---------------------------------------------------------------- tokenizer files

@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "good.tiktoken"
    Tokenizer.train(["the quick brown fox jumps over the lazy dog"] * 3, 270).save(path)
    return path


def header(**changed):
    return (HEADER + json.dumps({"tokens": 268, "pattern": r"\s+|\S+", **changed})).encode()


BAD_HEADERS = [b"", b"\x00", b"#", b"{}", HEADER.encode(), HEADER.encode() + b"{}",
               HEADER.encode() + b"[]", HEADER.encode() + b"null", HEADER.encode() + b"[" * 100_000,
               HEADER.encode() + b"\xff", header(tokens="many"), header(tokens=None),
               header(tokens=-1), header(tokens=10 ** 30), header(tokens=267), header(tokens=[]),
               HEADER.encode() + b'{"tokens": Infinity, "pattern": "x"}',
               HEADER.encode() + b'{"tokens": NaN, "pattern": "x"}',
               header(pattern=3), header(pattern=None), header(pattern="("), header(pattern="*"),
               header(pattern="(?<=a+)b"), header(pattern=[]), header(pattern="[z-a]"),
               header(pattern="(?R)"), header(pattern="\\p{Klingon}")]


@pytest.mark.parametrize("line", BAD_HEADERS, ids=range(len(BAD_HEADERS)))
def test_broken_tokenizer_headers(tmp_path, tokenizer_file, line):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(line + b"\n" + tokenizer_file.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(Exception) as caught:
        Tokenizer.load(path)
    assert_clear(caught.value, path)


BAD_RANKS = [b"", b"IQ==", b"IQ== 5 6", b"IQ== five", b"IQ== -1", b"IQ== 1e2", b"!!! 40", b"IQ 40",
             b"\xff\xfe 40", b"\x00 40", "é 40".encode(), b"IQ== " + b"9" * 5000, b" 40",
             b"IQ== 41", b"x" * 1_000_000]


@pytest.mark.parametrize("line", BAD_RANKS, ids=range(len(BAD_RANKS)))
def test_broken_tokenizer_lines(tmp_path, tokenizer_file, line):
    lines = tokenizer_file.read_bytes().split(b"\n")
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join([*lines[:41], line, *lines[42:]]))
    with pytest.raises(Exception) as caught:
        Tokenizer.load(path)
    assert_clear(caught.value, f"{path}:42: ")


# ---------------------------------------------------------------- checkpoints and exports

MODEL = {"vocab_size": 270, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 8, "ffn_dim": 8,
         "block_size": 16, "rope_base": 1e4, "norm_eps": 1e-5, "pooling": "mean"}
META = {"model": MODEL, "mask": {"alpha": 1.0, "axis": "row", "apply": "weights"},
        "passage_len": 16}
BAD_METAS = ["", "{", "[]", "null", "3", '"x"', "{}", "[" * 100_000, "\x00",
             json.dumps(without(META, "model")), json.dumps(without(META, "mask")),
             json.dumps(without(META, "passage_len")),
             *(json.dumps({**META, **changed}) for changed in (
                 {"model": None}, {"model": []}, {"model": {**MODEL, "surprise": 1}},
                 {"model": {**MODEL, "n_head": 3}}, {"model": {**MODEL, "n_layer": 0}},
                 {"model": {**MODEL, "n_layer": 2}}, {"model": {**MODEL, "n_embd": "8"}},
                 {"model": {**MODEL, "vocab_size": 99}}, {"mask": 3}, {"mask": {"alpha": 2.0}},
                 {"mask": {"alpha": "x"}}, {"mask": {"beta": 1}}, {"passage_len": "16"},
                 {"passage_len": 0}, {"passage_len": None}))]


def weights_of(shape):
    return embed.Conan(embed.ConanConfig(**shape)).state_dict()


@pytest.mark.parametrize("text", BAD_METAS, ids=range(len(BAD_METAS)))
def test_checkpoints_with_a_senseless_config(tmp_path, tokenizer_file, text):
    checkpoint.save(tmp_path / "run", 1, {
        "model.pt": weights_of(MODEL), "config.json": text,
        "tokenizer.tiktoken": tokenizer_file.read_bytes()})
    with pytest.raises(Exception) as caught:
        embed.Embedder(tmp_path / "run", device="cpu")
    assert_clear(caught.value, tmp_path / "run")


def test_the_config_above_is_a_good_one(tmp_path, tokenizer_file):
    checkpoint.save(tmp_path / "run", 1, {
        "model.pt": weights_of(MODEL), "config.json": json.dumps(META),
        "tokenizer.tiktoken": tokenizer_file.read_bytes()})
    assert embed.Embedder(tmp_path / "run", device="cpu").encode(["a"]).shape == (1, 8)


@pytest.mark.parametrize("missing", ["model.pt", "config.json", "tokenizer.tiktoken"])
def test_checkpoints_that_lack_a_file(tmp_path, tokenizer_file, missing):
    whole = {"model.pt": weights_of(MODEL), "config.json": json.dumps(META),
             "tokenizer.tiktoken": tokenizer_file.read_bytes()}
    checkpoint.save(tmp_path / "run", 1, without(whole, missing))
    with pytest.raises(Exception) as caught:
        embed.Embedder(tmp_path / "run", device="cpu")
    assert_clear(caught.value, tmp_path / "run", missing)


def safetensors(text, tail=b""):
    raw = text if isinstance(text, bytes) else json.dumps(text).encode()
    return struct.pack("<Q", len(raw)) + raw + tail


ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
BAD_SAFETENSORS = [
    b"", b"\x00", bytes(8), bytes(7), b"\xff" * 8, b"\xff" * 64, safetensors(b"{"),
    safetensors(b"\xff"), safetensors(b"[]"), safetensors(b"3"), safetensors(b"[" * 100_000),
    safetensors({"w": 3}), safetensors({"w": {}}), safetensors({"w": ENTRY}),
    *(safetensors({"w": {**ENTRY, **changed}}, bytes(4)) for changed in (
        {"dtype": "I8"}, {"dtype": None}, {"dtype": []}, {"shape": [2]}, {"shape": [-1]},
        {"shape": ["x"]}, {"shape": None}, {"data_offsets": [0, 8]}, {"data_offsets": [0]},
        {"data_offsets": None}, {"data_offsets": [0, 3]}, {"data_offsets": [4, 0]},
        {"data_offsets": [-4, 4]}, {"data_offsets": [0.0, 4.0]})),
]


@pytest.mark.parametrize("raw", BAD_SAFETENSORS, ids=range(len(BAD_SAFETENSORS)))
def test_broken_safetensors(tmp_path, raw):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(Exception) as caught:
        embed.read_safetensors(path)
    assert_clear(caught.value, path)


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b"3", b"null", b"{}", b"\xff", b"[" * 100_000,
                                  b'{"files": []}', b'{"files": {"nothing.txt": "00"}}',
                                  b'{"files": {"../secret": "00"}}', b'{"files": {"/etc/x": "00"}}',
                                  b'{"files": {"a/../../x": "00"}}', b'{"files": {"": "00"}}',
                                  b'{"files": {"model.safetensors": 3}}',
                                  b'{"files": {"\\u0000": ""}}'])
def test_broken_exports(tmp_path, text):
    (tmp_path / "secret").write_bytes(b"of somebody else")
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / embed.EXPORTED).write_bytes(text)
    (folder / "model.safetensors").write_bytes(safetensors({"w": ENTRY}, bytes(4)))
    with pytest.raises(Exception) as caught:
        embed.Embedder(folder, device="cpu")
    assert_clear(caught.value, folder)
    assert "secret: SHA" not in str(caught.value)              # nothing outside is even read


# ---------------------------------------------------------------- the settings of a run

BAD_SETTINGS = {
    **{f"--{name}=0": f"{name} must lie in" for name in (
        "steps", "batch_size", "log_every", "save_every", "keep_last", "query_len", "passage_len",
        "n_negatives", "pool_size", "temperature", "sts_temperature", "grad_clip", "rope_base")},
    **{f"--{name}=-1": f"{name} must lie in" for name in (
        "steps", "batch_size", "micro_batch_size", "remine_every", "seed", "learning_rate",
        "weight_decay", "warmup", "final_lr", "beta2", "temperature", "negative_cap")},
    **{f"--{name}=inf": f"{name} must lie in" for name in (
        "learning_rate", "weight_decay", "temperature", "sts_temperature", "grad_clip", "warmup",
        "final_lr", "beta2", "negative_cap", "rope_base")},
    **{f"--{name}=nan": f"{name} takes float" for name in (
        "learning_rate", "weight_decay", "temperature", "grad_clip", "warmup", "rope_base")},
    **{f"--{name}=0": f"{name} must" for name in (
        "n_layer", "n_head", "n_kv_head", "n_embd", "ffn_dim", "vocab_size")},
    "--block_size=0": "must not exceed block_size 0",
    **{f"--{name}=many": f"{name} takes int" for name in ("steps", "seed", "n_layer", "n_embd")},
    **{f"--{name}=1.5": f"{name} takes int" for name in ("steps", "seed", "n_layer", "n_embd")},
    **{f"--{name}=": f"{name} takes int" for name in ("steps", "seed", "n_layer")},
    **{f"--{name}": "needs a value" for name in ("steps", "out", "text", "learning_rate")},
    "--beta2=1": "beta2 must lie in",
    "--warmup=1.1": "warmup must lie in",
    "--n_head=7": "attention_dim 256 must be n_head 7 times",
    "--n_kv_head=3": "multiple of n_kv_head 3",
    "--pooling=max": "pooling takes",
    "--stage=embed": "stage takes",
    "--device=tpu": "device takes",
    "--dtype=float16": "dtype takes",
    "--schedule=cosine": "schedule takes",
    "--mask_axis=diagonal": "mask_axis takes",
    "--mask_apply=scores": "mask_apply takes",
    "--dhnm=v3": "dhnm takes",
    "--dims=0": "dims (0,) must lie in",
    "--dims=769": "dims (769,) must lie in",
    "--dims=64,x": "dims takes",
    "--task_weights=sts:-1": "task_weights",
    "--task_weights=sts:inf": "task_weights",
    "--task_weights=sts:nan": "task_weights",
    "--task_weights=sts": "task_weights",
    "--task_weights=nli:1": "task_weights",
    "--batch_sizes=sts:0": "batch_sizes",
    "--batch_sizes=sts:1.5": "batch_sizes",
    "--query_len=2000": "must not exceed block_size",
    "--seed=99999999999999999999999": "seed must lie in",
    "--steps=" + "9" * 5000: "steps takes int",
    "--batchsize=3": "nearest is 'batch_size'",
    "--lr=3": "unknown key 'lr'",
    "--": "unknown key ''",
    "-steps=3": "neither",
    "steps=3": "neither",
    "no_such_config.py": "no such config file",
    "../../etc/passwd": "neither",
    "--resume=perhaps": "resume takes bool",
}


@pytest.mark.parametrize("flag, reason", BAD_SETTINGS.items(),
                         ids=[flag[:30] for flag in BAD_SETTINGS])
def test_wrong_settings(flag, reason):
    with pytest.raises(Exception) as caught:
        load_config(train.TrainConfig, [flag])
    if len(flag) < 100:
        assert_clear(caught.value, reason)
    assert isinstance(caught.value, ValueError) and reason in str(caught.value)


BAD_CONFIGS = {
    b"steps": "NameError",
    b"steps = ": "SyntaxError",
    b"  steps = 3": "IndentationError",
    b"steps = 3\x00": "",
    b"\xff\xfe": "",
    b"steps = '3'": "steps takes int",
    b"steps = 3.0": "steps takes int",
    b"steps = None": "steps takes int",
    b"steps = -3": "steps must lie in",
    b"Steps = 3": "nearest is 'steps'",
    b"def steps(): pass": "steps takes int",
    b"dims = {64}": "dims takes",
    b"dims = 64": "dims takes",
    b"text = 'a.jsonl'": "text takes",
    b"text = ('a.jsonl', 3)": "text takes",
    b"task_weights = {'sts': '1'}": "task_weights takes",
    b"out = 3": "out takes str",
    b"learning_rate = float('nan')": "nan",
    b"1 / 0": "ZeroDivisionError",
    b"raise RuntimeError('no')": "RuntimeError: no",
    b"import no_such_module": "no_such_module",
    b"exit()": "SystemExit",
    b"def f(): f()\nf()": "RecursionError",
    b"(" * 5000: "",
    b"x = 1\n" * 3: "unknown key 'x'",
}


@pytest.mark.parametrize("text, reason", BAD_CONFIGS.items(), ids=range(len(BAD_CONFIGS)))
def test_wrong_config_files(tmp_path, text, reason):
    path = tmp_path / "wrong.py"
    path.write_bytes(text)
    with pytest.raises(Exception) as caught:
        load_config(train.TrainConfig, [str(path)])
    assert isinstance(caught.value, ValueError) and reason in str(caught.value)
    assert "wrong.py" in str(caught.value) or "must lie in" in str(caught.value)


# ---------------------------------------------------------------- as a user meets them

TINY = ["--n_embd=16", "--n_head=2", "--n_kv_head=1", "--ffn_dim=16", "--vocab_size=300",
        "--block_size=32", "--passage_len=16", "--query_len=8", "--steps=2", "--batch_size=2",
        "--device=cpu", "--dtype=float32"]


def run_in(folder, *command):
    return subprocess.run([sys.executable, *map(str, command)], cwd=folder, text=True,
                          capture_output=True, timeout=100, env=os.environ | {
                              "OMP_NUM_THREADS": "1"})


def test_training_on_a_bad_file_is_one_line_and_skipping_is_counted(tmp_path):
    lines = [as_line({"text": f"some words of line {i} to learn"}) for i in range(80)]
    lines[40] = b'{"text": '
    (tmp_path / "text.jsonl").write_bytes(b"\n".join(lines))
    command = [ROOT / "train.py", "--stage=pretrain", "--text=text.jsonl", *TINY]
    done = run_in(tmp_path, *command)
    assert done.returncode == 1 and "train.py: error: text.jsonl:41: not JSON" in done.stderr
    assert "Traceback" not in done.stderr
    done = run_in(tmp_path, *command, "--skip_bad_lines", "--out=again")
    assert done.returncode == 0, done.stderr
    assert "text: 1 bad lines left out, 79 taken" in done.stdout + done.stderr


def test_a_wrong_collection_is_noticed_before_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.jsonl").write_bytes(as_line({"text": "words " * 50}) + b"\n")
    folder = write_collection(tmp_path / "set", "qrels.tsv", b"q\tnothing\t1\n")
    with pytest.raises(SystemExit, match=re.escape(f"{folder / 'qrels.tsv'}:1: ")):
        train.main(["--stage=pretrain", "--text=text.jsonl", *TINY, f"--evaluate={folder}"])
    assert not list((tmp_path / "out/pretrain").glob("step_*"))


def test_a_changed_text_file_is_another_token_stream(tmp_path, monkeypatch):
    """Of the same name and as many lines: the cached tokens of the old one must not be taken."""
    monkeypatch.chdir(tmp_path)
    for word in ("first", "other"):
        (tmp_path / "text.jsonl").write_bytes(
            (as_line({"text": f"{word} words to learn"}) + b"\n") * 60)
        train.main(["--stage=pretrain", "--text=text.jsonl", *TINY, "--resume=false"])
    streams = sorted(tmp_path.glob("out/tokens-*.bin"), key=lambda path: path.stat().st_mtime_ns)
    tokenizer = Tokenizer.load(tmp_path / "out/tokenizer.tiktoken")
    assert len(streams) == 2
    assert "other" in tokenizer.decode(np.fromfile(streams[1], np.uint32)[:9])


def test_a_full_disk_leaves_no_half_index(tmp_path):
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not here")
    (tmp_path / "text.jsonl").write_bytes((as_line({"text": "a"}) + b"\n") * 5000)
    code = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import signal, data\n"
            "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "try:\n    data.JsonlFile('text.jsonl', 'text', 'cache')\n"
            "except OSError as error:\n    print('OSError', error)")
    done = subprocess.run(["prlimit", "--fsize=20000", sys.executable, "-c", code], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.stdout.startswith("OSError"), done.stderr
    assert not list((tmp_path / "cache").glob("*"))
