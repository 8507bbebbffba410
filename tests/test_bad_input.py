"""Bad input as a user meets it: one case for each message, and each is one clear line.

Bad lines and files of JSONL are in tests/engine/test_jsonl.py, rows in test_data.py, config files
in test_configurator.py. What may come out of a bad file is ValueError or OSError with its name.
"""
import json

import pytest

import embed
import eval as evaluation
import train
from configurator import load_config
from engine import checkpoint
from engine.collection import load_collection
from ranks import SMALL, write_collection, write_lines
from tokenizer import HEADER, PATTERN, Tokenizer


def assert_clear(error, *parts):
    """The error is for a person: of the right kind, not an accident, and it says where."""
    assert isinstance(error, (ValueError, OSError)), repr(error)
    assert not isinstance(error, UnicodeError), repr(error)
    text = str(error)
    for part in parts:
        assert str(part) in text, f"{part!r} is not in {text[:500]!r}"
    assert len(text) < 2000, "the file itself is in the message"


# ---------------------------------------------------------------- collections

BAD_COLLECTIONS = [                    # file, its content (None: missing), what the error says
    ("corpus.jsonl", None, "corpus.jsonl: no such file (nor corpus.jsonl.gz)"),
    ("qrels.tsv", None, "qrels.tsv: no such file"),
    ("qrels.tsv", b"query-id\tcorpus-id\tscore\n", "no query has a judged document"),
    ("corpus.jsonl", b'{"text": "a"}\n', "corpus.jsonl:1: id or _id must be a string"),
    ("corpus.jsonl", b'{"id": 3, "text": "a"}\n', "id or _id must be a string, not 3"),
    ("corpus.jsonl", b'{"id": "0", "text": "a"}\n' * 2, "corpus.jsonl:2: id '0' comes twice"),
    ("corpus.jsonl", b'{"id": "0"}\n', "corpus.jsonl:1: key 'text' is missing"),
    ("corpus.jsonl", b'{"id": "0", "text": "a", "title": 7}\n', "key 'title' must be str"),
    ("queries.jsonl", b'{"id": "0", "text": "a", "split": 1}\n', "key 'split' must be str"),
    ("queries.jsonl", b'{"id": "0", "text": "a", "answers": "a"}\n', "of query '0' must be"),
    ("queries.jsonl", b'{"id": "0", "text": "a", "answers": [7]}\n', "of query '0' must be"),
    ("qrels.tsv", b"nobody\t0\t1\n", "qrels.tsv:1: unknown query 'nobody'"),
    ("qrels.tsv", b"0\tnothing\t1\n", "qrels.tsv:1: unknown document 'nothing'"),
    ("qrels.tsv", b"0\t1\n", "qrels.tsv:1: query-id, corpus-id and a number are needed"),
    ("qrels.tsv", b"0\t0\tyes\n", "qrels.tsv:1: query-id, corpus-id and a number are needed"),
    ("qrels.tsv", b"0\t0\t1\n" + b"x" * 10_000_000, "qrels.tsv:2: query-id"),
    ("qrels.tsv", b"0\t0\t1\n1\t1\tscore\n", "qrels.tsv:2: query-id, corpus-id and a number are"),
    ("qrels.tsv", b"0\t0\tnan\n", "qrels.tsv:1: the score nan is not finite"),
    ("qrels.tsv", b"0\t0\tinf\n", "qrels.tsv:1: the score inf is not finite"),
    ("qrels.tsv", b"0\t0\t1\n0\t0\t0\n", "qrels.tsv:2: query '0' and document '0' have two"),
    ("qrels.tsv", b"0\t0\t1\n\xff\t1\t1\n", "qrels.tsv:2: not UTF-8"),
    ("qrels.tsv.gz", b"rubbish", "qrels.tsv.gz:1: cannot be read to the end"),
]


@pytest.mark.parametrize("name, content, reason", BAD_COLLECTIONS,
                         ids=range(len(BAD_COLLECTIONS)))
def test_broken_collections(tmp_path, name, content, reason):
    folder = write_collection(tmp_path / "set", ["a"], ["c"])
    (folder / name.removesuffix(".gz")).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(Exception) as caught:
        load_collection(folder)
    assert_clear(caught.value, folder, reason)


@pytest.mark.parametrize("task, row, reason", [
    ("sts", {"sentence1": "a", "sentence2": "b"}, "key 'score' is missing"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": "5"}, "must be int or float, not str"),
    ("sts", {"sentence1": "a", "sentence2": "b", "score": 1, "lang": 3}, "key 'lang' must be str"),
])
def test_broken_evaluation_files(tmp_path, task, row, reason):
    path = write_lines(tmp_path / "rows.jsonl", [row])
    with pytest.raises(Exception) as caught:
        evaluation.evaluate(evaluation.LexicalBaseline(), task, path)
    assert_clear(caught.value, reason)


# ---------------------------------------------------------------- tokenizer files

@pytest.fixture(scope="module")
def tokenizer_file(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "good.tiktoken"
    tokenizer.save(path)
    return path


def header(**changed):
    return (HEADER + json.dumps({"tokens": 283, "pattern": PATTERN, **changed})).encode()


BAD_HEADERS = {
    b"": "expected a line", HEADER.encode() + b"null": "expected a line",
    HEADER.encode() + b"[" * 100_000: "RecursionError",
    header(tokens="many"): "expected many and 256", header(tokens=282): "expected 282 and 256",
    header(pattern="(?R)"): "cuts words by another pattern, '(?R)'; train the tokenizer again"}


@pytest.mark.parametrize("line, reason", BAD_HEADERS.items(), ids=range(len(BAD_HEADERS)))
def test_broken_tokenizer_headers(tmp_path, tokenizer_file, line, reason):
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(line + b"\n" + tokenizer_file.read_bytes().split(b"\n", 1)[1])
    with pytest.raises(Exception) as caught:
        Tokenizer.load(path)
    assert_clear(caught.value, path, reason)


@pytest.mark.parametrize("line", [b"", b"IQ== 5 6", b"IQ== -1", b"!!! 40", b"\xff\xfe 40",
                                  b"AA== 40", b"IQ==  40", b"IQ== " + b"9" * 5000])
def test_broken_tokenizer_lines(tmp_path, tokenizer_file, line):
    lines = tokenizer_file.read_bytes().split(b"\n")
    path = tmp_path / "bad.tiktoken"
    path.write_bytes(b"\n".join([*lines[:41], line, *lines[42:]]))
    with pytest.raises(Exception) as caught:
        Tokenizer.load(path)
    assert_clear(caught.value, f"{path}:42: expected a new token of rank 40")


# ---------------------------------------------------------------- checkpoints and exports

MODEL = {"vocab_size": 285, "n_layer": 1, "n_head": 2, "n_kv_head": 1, "n_embd": 8, "ffn_dim": 8,
         "block_size": 16}
META = {"model": MODEL, "mask": {"alpha": 1.0, "axis": "row", "apply": "weights"},
        "passage_len": 16}


def without(row, key):
    return {k: v for k, v in row.items() if k != key}


BAD_METAS = {
    "{": "JSONDecodeError", "[" * 100_000: "RecursionError", "[]": "its config is not train.py's",
    **{json.dumps(meta): reason for meta, reason in (
        (without(META, "mask"), "KeyError('mask')"),
        ({**META, "model": None}, "its config is not train.py's"),
        ({**META, "model": {**MODEL, "surprise": 1}}, "surprise"),
        ({**META, "model": {**MODEL, "n_head": 3}}, "n_embd 8 must be n_head 3 times"),
        ({**META, "model": {**MODEL, "n_layer": 2}}, "does not fit its weights: RuntimeError"),
        ({**META, "model": {**MODEL, "n_embd": "8"}}, "its config is not train.py's"),
        ({**META, "model": {**MODEL, "vocab_size": 99}}, "285 tokens for a model of 99"),
        ({**META, "mask": {"alpha": 2.0}}, "alpha"),
        ({**META, "passage_len": 0}, "passage_len 0"),
        ({**META, "prompts": {"retrieval": 3}}, "prompts {'retrieval': 3}"))}}


def save_checkpoint(folder, tokenizer, text, leave_out=None):
    weights = embed.Conan(embed.ConanConfig(**MODEL)).state_dict()
    checkpoint.save(folder, 1, without({"model.pt": weights, "config.json": text,
                                        "tokenizer.tiktoken": tokenizer.to_bytes()}, leave_out))
    return folder


@pytest.mark.parametrize("text, reason", BAD_METAS.items(), ids=range(len(BAD_METAS)))
def test_checkpoints_with_a_senseless_config(tmp_path, tokenizer, text, reason):
    folder = save_checkpoint(tmp_path / "run", tokenizer, text)
    with pytest.raises(Exception) as caught:
        embed.Embedder(folder, device="cpu")
    assert_clear(caught.value, folder, reason)


def test_the_config_above_is_a_good_one_and_every_file_is_needed(tmp_path, tokenizer):
    folder = save_checkpoint(tmp_path / "run", tokenizer, json.dumps(META))
    assert embed.Embedder(folder, device="cpu").encode(["a"]).shape == (1, 8)
    for name in ("model.pt", "config.json", "tokenizer.tiktoken"):
        folder = save_checkpoint(tmp_path / name, tokenizer, json.dumps(META), name)
        with pytest.raises(Exception) as caught:
            embed.Embedder(folder, device="cpu")
        assert_clear(caught.value, folder, name)


@pytest.mark.parametrize("text", ["{", "null", "[" * 100_000, '{"files": []}',
                                  '{"files": {"nothing.txt": "00"}}',
                                  '{"files": {"../secret": "00"}}', '{"files": {"/etc/x": "00"}}',
                                  '{"files": {"a.bin": 3}}'])
def test_broken_exports(tmp_path, text):
    (tmp_path / "secret").write_bytes(b"of somebody else")
    folder = tmp_path / "export"
    folder.mkdir()
    (folder / embed.EXPORTED).write_text(text)
    (folder / "a.bin").write_bytes(b"1")
    with pytest.raises(Exception) as caught:
        embed.Embedder(folder, device="cpu")
    assert_clear(caught.value, folder)
    assert "secret: SHA" not in str(caught.value)              # nothing outside is even read


@pytest.mark.extras
@pytest.mark.parametrize("raw", [b"", b"\xff" * 64, (2).to_bytes(8, "little") + b"[]",
                                 (9).to_bytes(8, "little") + b'{"w": 3}\n'])
def test_broken_safetensors(tmp_path, raw):
    pytest.importorskip("safetensors")
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="model.safetensors: damaged safetensors file"):
        checkpoint.read_safetensors(path)


# ---------------------------------------------------------------- the settings of a run

BAD_SETTINGS = {
    **{f"--{name}={low}": f"{name} must lie in" for name, low in (
        ("steps", 0), ("batch_size", 0), ("log_every", 0), ("save_every", 0), ("n_negatives", 0),
        ("pool_size", 0), ("temperature", 0), ("micro_batch_size", -1), ("seed", -1),
        ("learning_rate", "inf"), ("weight_decay", -1), ("warmup", 1.1), ("final_lr", -1),
        ("beta2", 1), ("lora_rank", -1), ("vocab_size", 257), ("seed", 10 ** 22))},
    **{f"--{name}=0": f"{name} must be at least 1, not 0" for name in (
        "n_layer", "n_kv_head", "ffn_dim")},
    "--steps=" + "9" * 5000: "steps takes int",
    "--n_head=7": "n_embd 128 must be n_head 7 times", "--n_kv_head=3": "multiple of n_kv_head 3",
    "--dims=0": "dims (0,) must lie in", "--dims=769": "dims (769,) must lie in",
    "--query_len=2000": "must not exceed block_size",
    "--query_len=65": "query_len 65 exceeds passage_len 64", "--block_size=0": "block_size 0",
    "--task_weights=sts:-1": "values must be at least 0", "--task_weights=nli:1": "tasks are",
    "--batch_sizes=sts:0": "values must be at least 1", "--task_weights=sts:inf": "and finite"}


@pytest.mark.parametrize("flag, reason", BAD_SETTINGS.items(),
                         ids=[flag[:30] for flag in BAD_SETTINGS])
def test_wrong_settings(flag, reason):
    with pytest.raises(ValueError) as caught:
        load_config(train.TrainConfig, [flag])
    assert reason in str(caught.value)


# ---------------------------------------------------------------- as a user meets them

TEXT = [{"text": f"some words of line {i} to learn"} for i in range(120)]


def test_a_bad_line_ends_a_run_with_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_lines(tmp_path / "text.jsonl", TEXT)
    path.write_text(path.read_text().replace('{"text": "some words of line 40', '{"text": '))
    with pytest.raises(SystemExit, match="^train.py: error: text.jsonl:41: not JSON"):
        train.main(["--stage=pretrain", "--text=text.jsonl", *SMALL, "--passage_len=16",
                    "--query_len=8"])


def test_bad_lines_that_are_skipped_are_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "text.jsonl", [*TEXT, {"txt": "another key"}, *TEXT])
    train.main(["--stage=pretrain", "--text=text.jsonl", *SMALL, "--passage_len=16", "--steps=1",
                "--query_len=8", "--skip_bad_lines", "--batch_size=2"])
    assert "text: 1 bad lines left out, 240 taken" in "".join(capsys.readouterr())
