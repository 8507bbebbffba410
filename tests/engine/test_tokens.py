"""The token stream: windows do not depend on shards or ranks; a changed shard is named."""
import numpy as np
import pytest

from engine import tokens
from engine.index import together
from engine.tokens import TokenStream
from ranks import full_disk, on_ranks

TEXTS = [f"the fox {i} jumps" for i in range(100)]


def stream_on(world, tokenizer, folder, right):
    tokens.DOCUMENTS = 9
    stream = TokenStream(TEXTS, tokenizer, folder, 3, world)
    together(world, lambda: np.testing.assert_array_equal(stream.windows(np.arange(40), 16), right))


def test_windows_are_the_same_in_shards_of_any_size_and_on_any_ranks(tokenizer, tmp_path,
                                                                     monkeypatch):
    right = TokenStream(TEXTS, tokenizer, tmp_path / "one", 3).windows(np.arange(40), 16)
    on_ranks(3, stream_on, tokenizer, tmp_path / "ranks", right)
    assert len(list((tmp_path / "ranks").glob("*.bin"))) == 12
    monkeypatch.setattr(tokens, "DOCUMENTS", 1)            # a window reaches over several shards
    monkeypatch.setattr(tokens, "OPEN", 2)
    parts = TokenStream(TEXTS, tokenizer, tmp_path / "parts", 3)
    assert np.array_equal(parts.windows(np.arange(40), 16), right)
    assert parts._shard.cache_info().currsize == 2         # of all shards


def test_a_broken_build_continues(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "DOCUMENTS", 10)
    whole = TokenStream(TEXTS, tokenizer, tmp_path / "whole")
    folder, real, shards = tmp_path / "parts", tokenizer.encode_batch, []

    def dies(texts):
        if len(shards) == 4:
            raise KeyboardInterrupt
        shards.append(texts)
        return real(texts)
    monkeypatch.setattr(tokenizer, "encode_batch", dies)
    with pytest.raises(KeyboardInterrupt):
        TokenStream(TEXTS, tokenizer, folder)
    assert len(list(folder.iterdir())) == 8                # four shards and their seals
    monkeypatch.setattr(tokenizer, "encode_batch",
                        lambda texts: shards.append(texts) or real(texts))
    again = TokenStream(TEXTS, tokenizer, folder)
    assert len(shards) == 10 and shards[4][0] == TEXTS[40]
    assert again.read(0, len(again)).tolist() == whole.read(0, len(whole)).tolist()


def test_a_full_disk_leaves_no_shard(tokenizer, tmp_path):
    """Numpy's own way into a file would lose the last texts without a word."""
    with full_disk(1000), pytest.raises(OSError, match="too large"):
        TokenStream(TEXTS, tokenizer, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_changed_shard_is_named_and_built_again(tokenizer, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tokens, "DOCUMENTS", 50)
    first = TokenStream(TEXTS, tokenizer, tmp_path)
    right, path = first.read(0, len(first)).tolist(), tmp_path / "000001.bin"
    raw = path.read_bytes()
    for damaged in (raw[:-4], b"\0" * len(raw)):
        path.write_bytes(damaged)
        again = TokenStream(TEXTS, tokenizer, tmp_path)
        assert again.read(0, len(again)).tolist() == right
        assert f"{path} is damaged or unfinished; it is built again" in "".join(capsys.readouterr())
    path.unlink()
    again = TokenStream(TEXTS, tokenizer, tmp_path)
    assert again.read(0, len(again)).tolist() == right
