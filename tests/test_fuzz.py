"""Random inputs for everything that reads: a clear error or a right result, nothing in between.

FUZZ=10000 in the environment looks longer (examples of each test; default 100).
"""
import gzip
import hashlib
import json
import os
import shutil
import string
import tempfile
from dataclasses import fields
from pathlib import Path

import pytest
import torch

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402

import data  # noqa: E402
from configurator import ConfigError, load_config  # noqa: E402
from engine import checkpoint  # noqa: E402
from engine.collection import load_collection  # noqa: E402
from engine.index import JsonlFiles  # noqa: E402
from engine.jsonl import read_jsonl, read_texts  # noqa: E402
from tokenizer import Tokenizer, compose  # noqa: E402
from train import TrainConfig  # noqa: E402

pytestmark = pytest.mark.extras
fuzz = settings(max_examples=int(os.environ.get("FUZZ", 100)), deadline=None,
                suppress_health_check=list(HealthCheck))

KEYS = ["text", "query", "pos", "neg", "prompt", "input", "output", "instruction", "sentence1",
        "sentence2", "score", "id", "_id", "title", "lang", "split", ""]
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() \
    | st.sampled_from(["a", " ", "\ud800", "\x00", 10 ** 400])
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(KEYS) | st.text(), inner, max_size=4), max_leaves=8)
ROWS = st.dictionaries(st.sampled_from(KEYS), VALUES, max_size=6)
GOOD = [b'{"text": "a text", "query": "q", "pos": ["p", "r"], "neg": ["n"], "prompt": "do"}',
        b'{"sentence1": "a", "sentence2": "b", "score": 2.5, "text": "\\ud83d\\ude00"}',
        '{"input": "日本", "output": "é", "text": "x", "id": "1"}'.encode()]


@st.composite
def damaged(draw, sources):
    """Draw bytes like one of `sources`, with some replaced, inserted or cut off."""
    raw = bytearray(draw(st.sampled_from(sources)))
    for _ in range(draw(st.integers(1, 3))):
        at, kind = draw(st.integers(0, max(len(raw) - 1, 0))), draw(st.sampled_from("rid"))
        if kind == "r" and raw:
            raw[at] = draw(st.integers(0, 255))
        elif kind == "i":
            raw[at:at] = draw(st.binary(max_size=4) | st.sampled_from([b'"', b"{", b"]", b"\\"]))
        else:
            del raw[at:at + draw(st.sampled_from([1, 2, 10 ** 6]))]
    return bytes(raw)


LINES = st.binary(max_size=60) | ROWS.map(lambda row: json.dumps(row).encode()) | damaged(GOOD) \
    | st.sampled_from(GOOD)


@pytest.fixture
def folder(tmp_path):
    """A function that returns a fresh folder for each example."""
    return lambda: Path(tempfile.mkdtemp(dir=tmp_path))


def is_clear(error, path):
    assert isinstance(error, (ValueError, OSError)) and not isinstance(error, UnicodeError)
    return str(path) in str(error) and len(str(error)) < 2000


# ---------------------------------------------------------------- readers

def is_right(kind, row):
    """Tell whether a row that was taken has what its format promises."""
    if kind == "text":
        return isinstance(row, str) and row.strip() and row.encode()
    if kind == "sts":
        return row["sentence1"].strip().encode() and abs(row["score"]) < 3.4e38
    texts = [row["query"], *row["pos"], *row["neg"]]
    return row["pos"] and all(t.strip().encode() for t in texts) \
        and (row["prompt"] is None or isinstance(row["prompt"], str))


@pytest.mark.parametrize("kind", data.PARSERS)
@given(lines=st.lists(LINES, max_size=6))
@fuzz
def test_any_file_gives_right_rows_or_a_clear_error(folder, kind, lines):
    where = folder()
    path = where / "rows.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        rows = JsonlFiles([path], data.PARSERS[kind], where)
    except Exception as error:
        assert is_clear(error, path)
    else:
        assert all(is_right(kind, rows[i]) for i in range(len(rows))) and rows.bad == 0
    try:
        rows = JsonlFiles([path], data.PARSERS[kind], where, skip_bad=True)
    except ValueError as error:
        assert "no usable line" in str(error)
    else:
        assert all(is_right(kind, rows[i]) for i in range(len(rows)))
        assert len(rows) + rows.bad == len(path.read_bytes().rstrip().split(b"\n"))


@given(raw=damaged([gzip.compress(b"\n".join(GOOD * 50)), gzip.compress(b"")])
       | st.binary(max_size=50))
@fuzz
def test_any_gz_gives_right_rows_or_a_clear_error(folder, raw):
    where = folder()
    path = where / "rows.jsonl.gz"
    path.write_bytes(raw)
    for read in (lambda: JsonlFiles([path], data.parse_text, where),
                 lambda: list(read_jsonl(path))):
        try:
            read()
        except Exception as error:
            assert is_clear(error, path)


@given(raw=st.binary(max_size=60) | st.text(max_size=60).map(lambda text: text.encode("utf-16"))
       | damaged(GOOD), name=st.sampled_from(["a.txt", "a.json", "a.txt.gz"]))
@fuzz
def test_any_file_of_texts_is_read_or_refused(folder, raw, name):
    path = folder() / name
    path.write_bytes(raw)
    try:
        texts = read_texts(path)
    except Exception as error:
        assert is_clear(error, path)
    else:
        assert all(isinstance(text, str) and text.encode() is not None for text in texts)


@given(corpus=st.lists(LINES, max_size=3), queries=st.lists(LINES, max_size=3),
       qrels=st.binary(max_size=40) | st.just(b"1\t1\t1\n")
       | damaged([b"1\t1\t1\n", b"query-id\tcorpus-id\tscore\n1\t1\t2"]))
@fuzz
def test_any_collection_is_read_or_refused(folder, corpus, queries, qrels):
    where = folder()
    (where / "corpus.jsonl").write_bytes(b"\n".join(corpus))
    (where / "queries.jsonl").write_bytes(b"\n".join(queries))
    (where / "qrels.tsv").write_bytes(qrels)
    try:
        found = load_collection(where)
    except Exception as error:
        assert is_clear(error, where)
    else:
        known = {row["id"] for row in found.corpus}
        assert found.queries and all(set(j) <= known for j in found.qrels.values())


# ---------------------------------------------------------------- tokenizer

@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    texts = ["the quick brown fox", "日本語 текст हिन्दी", "def f(x):\n    return x",
             "<|endoftext|>"]
    return Tokenizer.train(texts * 4, 330)


@given(text=st.text() | st.text(alphabet="ab \n<|endoftxp>é日\u0301\u200d", max_size=200))
@fuzz
def test_any_text_survives_the_tokenizer(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == compose(text) and ids == tokenizer.encode_batch([text])[0]
    assert tokenizer.eos_id not in ids and tokenizer.pad_id not in ids


@given(text=st.text(alphabet=st.characters(categories=["Cs", "L"])))
@fuzz
def test_lone_surrogates_become_u_fffd(tokenizer, text):
    clean = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    assert tokenizer.decode(tokenizer.encode(text)) == compose(clean)


@given(change=st.data())
@fuzz
def test_any_tokenizer_file_is_refused_or_whole(folder, tokenizer, change):
    path = folder() / "t.tiktoken"
    tokenizer.save(path)
    path.write_bytes(change.draw(damaged([path.read_bytes()])))
    try:
        found = Tokenizer.load(path)
    except Exception as error:
        assert is_clear(error, path)
    else:
        assert found.vocab_size == tokenizer.vocab_size


# ---------------------------------------------------------------- settings

NAMES = [field.name for field in fields(TrainConfig)]
ALPHABET = string.ascii_letters + string.digits + "-+.,:()[]'\" _einfat\x00é"
FLAGS = st.builds("--{}={}".format, st.sampled_from(NAMES), st.text(ALPHABET, max_size=12)
                  | st.integers().map(str) | st.floats().map(str)) | st.text(max_size=10) \
    | st.sampled_from([f"--{name}" for name in NAMES])


@given(argv=st.lists(FLAGS.filter(lambda arg: arg not in ("-h", "--help")), max_size=5))
@fuzz
def test_any_command_line_is_a_config_or_one_clear_error(argv):
    try:
        cfg = load_config(TrainConfig, argv)
    except ConfigError as error:
        assert str(error)
    else:
        assert cfg.steps >= 1 and cfg.temperature > 0 and cfg.n_embd % cfg.n_head == 0


@given(values=st.dictionaries(st.sampled_from(NAMES), LEAVES | st.lists(LEAVES, max_size=3)
                              | st.dictionaries(st.text(), LEAVES, max_size=2), max_size=4))
@fuzz
def test_any_values_in_a_config_file(folder, values):
    path = folder() / "c.py"
    path.write_text("nan, inf = float('nan'), float('inf')\ndel nan, inf\n" if not values else
                    "_n, _i = float('nan'), float('inf')\n" + "".join(
                        f"{name} = {value!r}\n".replace("nan", "_n").replace("inf", "_i")
                        for name, value in values.items()), "utf-8", "backslashreplace")
    try:
        load_config(TrainConfig, [str(path)])
    except ConfigError as error:
        assert str(error)


# ---------------------------------------------------------------- checkpoints

FILES = {"model.pt": {"w": torch.arange(20.0), "name": "x"}, "config.json": '{"a": 1}',
         "tokens.bin": b"\x00\xff" * 9}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return checkpoint.save(tmp_path_factory.mktemp("run"), 3, FILES)


@given(raw=st.binary(max_size=300), change=st.data())
@fuzz
def test_a_file_whose_hash_is_right_but_not_its_contents(folder, saved, raw, change):
    """Whoever can write a manifest can hash what he likes: no code runs, the file is refused."""
    where = folder() / saved.name
    shutil.copytree(saved, where)
    raw = change.draw(st.just(raw) | damaged([(saved / "model.pt").read_bytes()]))
    (where / "model.pt").write_bytes(raw)
    entries = checkpoint.entries(saved)
    entries["model.pt"] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    (where / checkpoint.MANIFEST).write_text(checkpoint._manifest_text(entries))
    try:
        checkpoint.load(where, "model.pt")
    except Exception as error:
        assert isinstance(error, checkpoint.CorruptCheckpoint) and is_clear(error, where)


ENTRIES = st.fixed_dictionaries({"dtype": st.sampled_from(["F32", "BF16", "I8", 3]),
                                 "shape": st.lists(st.integers(-1, 4), max_size=3),
                                 "data_offsets": st.lists(st.integers(-4, 20), max_size=3)})
HEADERS = st.dictionaries(st.sampled_from(["w", "__metadata__", "v"]), VALUES | ENTRIES, max_size=3)


@given(head=HEADERS.map(lambda h: json.dumps(h).encode()) | st.binary(max_size=30),
       tail=st.binary(max_size=20), length=st.none() | st.integers(0, 2 ** 64 - 1))
@fuzz
def test_any_safetensors_file(folder, head, tail, length):
    path = folder() / "m.safetensors"
    size = len(head) if length is None else length
    path.write_bytes(size.to_bytes(8, "little") + head + tail)
    try:
        tensors = checkpoint.read_safetensors(path)
    except Exception as error:
        assert is_clear(error, path)
    else:
        assert all(torch.is_tensor(t) for t in tensors.values())
