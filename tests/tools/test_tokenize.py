"""tools.tokenize: stage 1 finds the shards that several processes wrote."""
import pytest

import train
from engine import tokens
from ranks import arguments, log, on_ranks
from tools import tokenize


def tokenize_on(world, argv):
    tokens.DOCUMENTS = 9
    real, tokenize.distributed.start = tokenize.distributed.start, lambda device: world
    stop, tokenize.distributed.stop = tokenize.distributed.stop, lambda: None
    tokenize.main(argv)
    tokenize.distributed.start, tokenize.distributed.stop = real, stop


def test_stage_1_reads_the_shards(rows, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "DOCUMENTS", 9)
    on_ranks(2, tokenize_on, arguments(rows, "pretrain", tmp_path / "a"))
    folder, = (tmp_path / "a").glob("tokens-*")
    stamps = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert len(stamps) == 22                               # of 96 documents, and their seals
    monkeypatch.setattr(tokens, "atomic", lambda *_: pytest.fail("written again"))
    train.main(arguments(rows, "pretrain", tmp_path / "a"))
    monkeypatch.undo()
    assert stamps == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    train.main(arguments(rows, "pretrain", tmp_path / "b"))            # in one shard
    assert log(tmp_path / "a", "pretrain") == log(tmp_path / "b", "pretrain")


def test_only_stage_1_has_tokens(rows, tmp_path):
    with pytest.raises(ValueError, match="stage embed_sup reads no tokens"):
        tokenize.main(arguments(rows, "embed_sup", tmp_path))
