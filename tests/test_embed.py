"""Embedder and search: the trained prompt travels, caches carry hashes, odd files are named."""
import base64
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import embed
from data import Batch, prompt_length
from embed import Embedder, search
from engine import checkpoint
from engine import vectors as engine_vectors
from engine.jsonl import atomic
from engine.vectors import load_index, save_vectors
from mask import FULL, MaskSpec
from ranks import full_disk, write_run
from tokenizer import Tokenizer

TRAINED = {"retrieval": "Represent this question for search", "sts": ""}


@pytest.fixture
def run(tmp_path, tokenizer):
    """A run of train.py with random weights and a prompt of its own."""
    return write_run(tmp_path / "embed_sup", tokenizer, prompts=TRAINED)


class Noting(torch.nn.Module):
    """A model that notes the texts and the tokens to skip; its embedding counts a text's tokens."""

    def __init__(self):
        super().__init__()
        self.config, self.calls = SimpleNamespace(n_embd=2, block_size=64), []
        self.weight = torch.nn.Parameter(torch.ones(1))            # it has the device

    def forward(self, ids, lengths, mask, skip=None):
        self.calls.append((ids.tolist(), lengths, skip, mask))
        return torch.tensor([[length, 1.0] for length in lengths])


def in_memory(tokenizer, mask=FULL, **options):
    return Embedder.of(Noting(), tokenizer, mask, 32, **options)


# ---------------------------------------------------------------- encode

def test_a_pass_has_a_bounded_number_of_tokens(tokenizer, monkeypatch):
    monkeypatch.setattr(embed, "MOST_TOKENS", 70)
    monkeypatch.setattr(embed, "TOKENS_AT_A_TIME", 10)
    embedder = in_memory(tokenizer)
    embedder.encode(["word"] * 9 + ["words " * 40] * 5, batch_size=4)
    lengths = [call[1] for call in embedder.model.calls]
    assert lengths[:2] == [[32, 32]] * 2 and lengths[2][0] == 32           # of 70 two have room
    assert {len(texts) for texts in lengths[3:-1]} == {4}
    monkeypatch.setattr(embed, "TOKENS_AT_A_TIME", 60)                     # of short texts more
    embedder.encode(["word"] * 9, batch_size=4)
    assert len(embedder.model.calls[-1][1]) == 9
    monkeypatch.setattr(embed, "MOST_TOKENS", 20)
    assert len(embedder.encode(["words " * 40] * 2)) == 2                  # one at a time


@pytest.mark.parametrize("at_a_time", [3, 20_000])
def test_order_shape_and_prefixes(run, monkeypatch, at_a_time):
    monkeypatch.setattr(embed, "TEXTS_AT_A_TIME", at_a_time)
    embedder = Embedder(run, device="cpu")
    texts = ["words", "the rank of a matrix " * 9, "", "lists"]
    vectors = embedder.encode(texts, batch_size=2)
    assert vectors.shape == (4, 16) and vectors.dtype == np.float32
    for text, vector in zip(texts, vectors):
        assert embedder.encode(text) == pytest.approx(vector, abs=1e-6)
    cut = vectors[:, :4] / np.linalg.norm(vectors[:, :4], axis=1, keepdims=True)
    assert embedder.encode(texts, truncate_dim=4) == pytest.approx(cut, abs=1e-6)
    raw = embedder.encode(texts, normalize=False)
    assert raw / np.linalg.norm(raw, axis=1, keepdims=True) == pytest.approx(vectors, abs=1e-6)
    assert (abs(np.linalg.norm(raw, axis=1) - 1) > 0.01).all()
    assert embedder.encode("words", truncate_dim=4, normalize=False) == pytest.approx(
        raw[0, :4], abs=1e-6)
    assert embedder.encode([]).shape == (0, 16)
    with pytest.raises(ValueError, match="truncate_dim 17 must lie in 1 .. 16"):
        embedder.encode(texts, truncate_dim=17)
    with pytest.raises(ValueError, match="batch_size must be at least 1, not 0"):
        embedder.encode(texts, batch_size=0)
    with pytest.raises(TypeError, match="text 1 is a int, not a string"):
        embedder.encode(["a", 1])


def test_the_instructions_tokens_are_skipped_and_the_mask_is_the_checkpoints(tokenizer):
    embedder = in_memory(tokenizer, MaskSpec(0.5, "col"))
    embedder.encode(["words", "lists"], prompt="Find")
    ids, lengths, skip, mask = embedder.model.calls[0]
    assert mask == MaskSpec(0.5, "col")
    start = tokenizer.encode("Find\n")
    assert skip == [len(start)] * 2 and ids[:len(start)] == start
    whole = [len(tokenizer.encode(f"Find\n{text}")) + 1 for text in ("words", "lists")]
    assert sorted(lengths) == sorted(whole)
    embedder.encode(["words"])
    assert embedder.model.calls[1][2] == [0]


@pytest.mark.parametrize("text", ["", "words", "the rank of a matrix " * 9])
def test_every_text_ends_with_the_end_of_text(tokenizer, text):
    """As in training; a cut text keeps its end."""
    embedder = in_memory(tokenizer)
    embedder.encode([text])
    ids, lengths, *_ = embedder.model.calls[0]
    assert ids == tokenizer.encode(text)[:31] + [tokenizer.eos_id] and lengths == [len(ids)]
    batch = Batch.of("sts", [text], [32], tokenizer, np.arange(1))
    assert batch.ids.tolist() == ids


@pytest.mark.parametrize("dtype, name", [
    (None, "float32"), ("float32", "float32"), ("bfloat16", "bfloat16"),
    (torch.bfloat16, "bfloat16")])
def test_dtypes_by_name_and_as_torch_has_them(run, dtype, name):
    """What is called bfloat16 is computed so, and differs from float32."""
    embedder, exact = Embedder(run, "cpu", dtype), Embedder(run, "cpu", "float32")
    assert embedder.dtype == name
    gap = np.abs(embedder.encode(["the rank of words"]) - exact.encode(["the rank of words"]))
    assert (gap.max() > 0) == (name == "bfloat16") and gap.max() < 0.05


def test_a_device_that_is_not_there_is_an_error_of_one_line(run):
    with pytest.raises(ValueError, match="device 'gpu' is not available"):
        Embedder(run, "gpu")


@pytest.mark.parametrize("dtype", ["float16", torch.float16, 16])
def test_other_dtypes_are_refused(run, dtype):
    with pytest.raises(ValueError, match="dtype .* is unknown; choose float32 or bfloat16"):
        Embedder(run, "cpu", dtype)


# ---------------------------------------------------------------- what a checkpoint says

def test_the_trained_prompts_travel(run, tmp_path, tokenizer):
    assert Embedder(run, "cpu").prompts == TRAINED
    assert in_memory(tokenizer).prompts == embed.PROMPTS
    assert in_memory(tokenizer, prompts={"sts": "x"}).prompts == {"sts": "x"}
    for prompts in ({"retrieval": 3}, ["Find"], None):
        bad = write_run(tmp_path / f"bad{type(prompts).__name__}", tokenizer, prompts=prompts)
        with pytest.raises(ValueError, match="its config is not train.py's"):
            Embedder(bad, "cpu")


def test_an_instruction_that_leaves_no_room_is_refused(run, tokenizer):
    """Else every query would have one vector: that of the instruction's end."""
    embedder = Embedder(run, "cpu")                    # reads 64 tokens; an x is one
    around = prompt_length(tokenizer, "x") - 1
    one, other = embedder.encode(["lists", "a matrix"], prompt="x" * (62 - around))
    assert not np.array_equal(one, other)
    with pytest.raises(ValueError, match="has 63 tokens, and the model reads 64"):
        embedder.encode(["lists"], prompt="x" * (63 - around))


def test_a_name_that_cannot_be_written_shows_before_the_work(run, tmp_path, monkeypatch, capsys):
    (tmp_path / "a.txt").write_text("one\n")
    monkeypatch.setattr(Embedder, "encode", lambda *_, **__: pytest.fail("encoded in vain"))
    for out in (tmp_path, tmp_path / "x.npy.gz"):
        monkeypatch.setattr("sys.argv", ["embed.py", f"--checkpoint={run}", f"--out={out}",
                                         f"--texts={tmp_path / 'a.txt'}"])
        with pytest.raises(SystemExit):
            embed.main()
    assert not list(tmp_path.glob("x.npy*"))


# ---------------------------------------------------------------- search

def write_corpus(folder, key="id"):
    folder.mkdir(exist_ok=True)
    rows = [{key: "a", "title": "Rank", "text": "of a matrix"}, {key: "b", "text": "words"}]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    return folder


def test_search_asks_with_the_trained_prompt(run, tmp_path):
    embedder = Embedder(run, "cpu")
    rows, vectors = load_index(embedder, write_corpus(tmp_path / "docs"))
    assert vectors == pytest.approx(embedder.encode(["Rank of a matrix", "words"]), abs=1e-6)
    query = embedder.encode("lists", prompt=TRAINED["retrieval"])
    best = search(embedder, rows, vectors, "lists", k=2)
    assert [row for _, row in best] == [rows[i] for i in np.argsort(-(vectors @ query))]
    assert search(embedder, rows, vectors, "lists", k=1) == best[:1]
    assert [score for score, _ in best] == pytest.approx(sorted(vectors @ query)[::-1], abs=1e-6)
    bare = search(embedder, rows, vectors, "lists", k=2, prompt="")
    assert [score for score, _ in bare] == pytest.approx(
        sorted(vectors @ embedder.encode("lists"))[::-1], abs=1e-6)
    assert bare[0][0] != pytest.approx(best[0][0], abs=1e-4)


def test_a_folder_that_cannot_be_written_to_is_searched_all_the_same(
        run, tmp_path, capsys, monkeypatch):
    def refused(*_):
        raise PermissionError("read-only")
    monkeypatch.setattr("engine.vectors.atomic", refused)
    rows, vectors = load_index(Embedder(run, "cpu"), write_corpus(tmp_path / "docs"))
    assert len(rows) == len(vectors) == 2
    assert "the embeddings are not kept: read-only" in capsys.readouterr().err


def test_the_index_is_built_anew_when_model_or_corpus_changes(
        run, tmp_path, tokenizer, capsys, monkeypatch):
    corpus = write_corpus(tmp_path / "docs", key="_id")             # BEIR's name for it
    assert load_index(Embedder(run, "cpu"), corpus)[0][0]["id"] == "a"
    names = [path.name for path in run.glob("index-*")]
    load_index(Embedder(run, "cpu"), corpus)
    assert capsys.readouterr().err.count("documents of") == 1       # the second time: the cache
    with open(corpus / "corpus.jsonl", "a") as file:
        file.write('{"_id": "c", "text": "lists"}\n')
    text = (corpus / "corpus.jsonl").read_text().replace("\n\n", "\n")
    (corpus / "corpus.jsonl").write_text(text)
    assert len(load_index(Embedder(run, "cpu"), corpus)[1]) == 3
    other = write_run(tmp_path / "other", tokenizer, seed=1)
    load_index(Embedder(other, "cpu"), corpus)
    names += [path.name for folder in (run, other) for path in folder.glob("index-*")]
    assert len(names) == len(set(names)) == 3
    monkeypatch.setattr(engine_vectors, "INDEX_VERSION", engine_vectors.INDEX_VERSION + 1)
    load_index(Embedder(other, "cpu"), corpus)
    assert len(list(other.glob("index-*"))) == 1                    # and the old one is gone
    load_index(Embedder(other, "cpu"), write_corpus(tmp_path / "more"))
    assert len(list(other.glob("index-*"))) == 2                    # each corpus has its own


def command(monkeypatch, *argv):
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, argv)])
    embed.main()


def test_texts_become_a_file_of_vectors(run, tmp_path, monkeypatch):
    (tmp_path / "texts.txt").write_bytes(b"\xef\xbb\xbfwords\nlists\n")     # a byte order mark
    (tmp_path / "bad.txt").write_bytes("fine\nCafé\n".encode("latin-1"))
    argv = ["--checkpoint", run, "--device=cpu", "--out", tmp_path / "x.npy", "--texts"]
    for more, options in (([], {}), (["--prompt=Find", "--truncate_dim=4"],
                                     {"prompt": "Find", "truncate_dim": 4})):
        command(monkeypatch, *argv, tmp_path / "texts.txt", *more)
        want = Embedder(run, "cpu").encode(["words", "lists"], **options)
        assert np.load(tmp_path / "x.npy") == pytest.approx(want, abs=1e-6)
    with pytest.raises(SystemExit, match="bad.txt:2: "):
        command(monkeypatch, *argv, tmp_path / "bad.txt")


def test_the_command_line_searches(run, tmp_path, monkeypatch, capsys):
    corpus = write_corpus(tmp_path / "docs")
    argv = ["--checkpoint", run, "--device=cpu", "--corpus", corpus, "--query=lists", "--k=1"]
    for more in ([], ["--prompt="], ["--prompt=Represent this question for search"]):
        command(monkeypatch, *argv, *more)
    lines = capsys.readouterr().out.splitlines()
    shown = [line for line in lines if line.startswith("  1  ")]
    assert len(lines) == 6 and len(shown) == 3 and shown[0] == shown[2] != shown[1]
    with pytest.raises(SystemExit, match="corpus.jsonl: no such file"):
        command(monkeypatch, *argv[:4], tmp_path / "none", "--query=x")
    with pytest.raises(SystemExit, match="--query is empty"):
        command(monkeypatch, *argv[:3], argv[3], argv[4], "--query= ")
    with pytest.raises(SystemExit, match="--k must be at least 1, not -1"):
        command(monkeypatch, *argv[:-1], "--k=-1")
    with pytest.raises(SystemExit, match="--texts needs --out"):
        command(monkeypatch, "--texts=x")
    with pytest.raises(SystemExit, match="x: the input would be replaced"):
        command(monkeypatch, "--texts=x", "--out=x")
    for more in (["--truncate_dim=8"], ["--out=x.npy"], ["--texts=x", "--out=x.npy"]):
        with pytest.raises(SystemExit, match="are for --texts, --query is for a search"):
            command(monkeypatch, "--query=x", *more)


def test_a_full_disk_leaves_no_vectors(tmp_path):
    path, vectors = tmp_path / "x.npy", np.random.rand(8, 32).astype(np.float32)
    with full_disk(1000), pytest.raises(OSError, match="too large"), atomic(path, "wb") as file:
        save_vectors(file, vectors)
    assert not list(tmp_path.iterdir())
    with atomic(path, "wb") as file:
        save_vectors(file, vectors)
    assert np.array_equal(np.load(path), vectors)


@pytest.mark.parametrize("left", [0, -8])
def test_a_damaged_index_is_named(run, tmp_path, left):
    """An empty one, too: its EOFError would pass for the end of the queries."""
    corpus = write_corpus(tmp_path / "docs")
    load_index(Embedder(run, "cpu"), corpus)
    path, = run.glob("index-*.npy")
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=rf"{path} is damaged, delete it: "):
        load_index(Embedder(run, "cpu"), corpus)


@pytest.mark.parametrize("last, code", [(" ", 0), (EOFError(), 0), (KeyboardInterrupt(), 130)])
def test_queries_are_asked_for_one_by_one(run, tmp_path, monkeypatch, capsys, last, code):
    """Until an empty one; the end of the input and Ctrl-C end them, too."""
    typed = iter(["lists", "words", last])

    def ask(_):
        if isinstance(line := next(typed), str):
            return line
        raise line
    monkeypatch.setattr("builtins.input", ask)
    corpus = write_corpus(tmp_path / "docs") / "corpus.jsonl"      # the file itself will do
    with pytest.raises(SystemExit) as caught:
        sys.exit(command(monkeypatch, "--checkpoint", run, "--device=cpu", "--corpus", corpus))
    assert (caught.value.code or 0) == code and not list(typed)
    shown = capsys.readouterr().out
    assert shown.count("  1  ") == shown.count("  2  ") == 2


def test_what_else_decides_the_vectors_is_in_the_name_of_their_index(run, tmp_path):
    corpus, embedder, names = write_corpus(tmp_path / "docs"), Embedder(run, "cpu"), set()
    for change in ({}, {"max_len": 3}, {"dtype": "bfloat16"}):
        vars(embedder).update(change)
        load_index(embedder, corpus)
        names |= {path.name for path in run.glob("index-*.npy")}
    assert len(names) == 3


def test_no_text_is_longer_than_the_models_context(tmp_path, tokenizer):
    embedder = Embedder(write_run(tmp_path / "x", tokenizer, passage_len=500), "cpu")
    assert embedder.max_len == 64 and embedder.encode(["words " * 99]).shape == (1, 16)


def test_a_model_in_memory_computes_in_the_dtype_of_its_run(run, tokenizer):
    exact = Embedder(run, "cpu", "float32")
    rough = Embedder.of(exact.model, tokenizer, FULL, 64, dtype="bfloat16")
    gap = np.abs(rough.encode(["the rank of words"]) - exact.encode(["the rank of words"]))
    assert 0 < gap.max() < 0.05 and exact.model.norm.weight.dtype == torch.float32


def test_a_changed_tokenizer_of_a_named_checkpoint_is_refused(run):
    """`latest` verifies what it finds; of a checkpoint that is named each file is, one by one."""
    where = checkpoint.latest(run)
    *head, last, end = (where / "tokenizer.tiktoken").read_bytes().split(b"\n")
    word, rank = last.split()
    other = base64.b64encode(base64.b64decode(word)[::-1] + b"z")
    (where / "tokenizer.tiktoken").write_bytes(b"\n".join([*head, other + b" " + rank, end]))
    assert Tokenizer.load(where / "tokenizer.tiktoken")            # for itself it is whole
    with pytest.raises(checkpoint.CorruptCheckpoint, match="tokenizer.tiktoken: "):
        Embedder(where, "cpu")


def test_a_folder_of_runs_names_them(run):
    with pytest.raises(FileNotFoundError, match=rf"no checkpoint here; .* \({run}\)$"):
        Embedder(run.parent, "cpu")
