"""Mining: by hand, and equal to a plain search of all pairs; files that ranks fill together."""
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import parse_pair
from engine import mining
from engine.index import JsonlFiles, text_id
from engine.mining import Exact, mine
from engine.passages import Passages
from ranks import on_ranks, write_lines

EYE = np.eye(4, dtype=np.float32)
QUERY = np.array([[0.9, 0.8, 0.7, 0.1]], dtype=np.float32)


def plain(queries, passages, positives, depth, given, n_given):
    """Return what the first edition did: all scores of a query at once, then a stable sort."""
    pool = np.full((len(queries), depth), -1)
    for q, scores in enumerate((torch.from_numpy(queries) @ torch.from_numpy(passages).T).numpy()):
        own = np.array(given[q], dtype=np.int64)
        own = own[np.argsort(-scores[own], kind="stable")]
        near = np.argsort(-scores, kind="stable") if len(own) < max(n_given, 1) else own[:0]
        near = near[~np.isin(near, [*positives[q], *own])]
        chosen = np.concatenate([own, near])[:depth]
        pool[q, :len(chosen)] = chosen
    return pool


def test_mining_orders_by_score_and_leaves_out_positives():
    def pool(*args):
        numbers, scores = mine(QUERY, EYE, *args)
        n = int((numbers >= 0).sum())
        assert scores[0].tolist() == QUERY[0, numbers[0, :n]].tolist() + [0] * (numbers.size - n)
        return numbers[0].tolist()
    assert pool([[0]], 3) == [1, 2, 3]
    assert pool([[0, 1]], 3) == [2, 3, -1]
    assert pool([[1]], 1) == [0]


def test_given_negatives_come_first_ranked_by_the_model():
    def pool(given, n_given, depth=3):
        return mine(QUERY, EYE, [[0]], depth, given=given, n_given=n_given)[0].tolist()
    assert pool([[3, 2]], 2) == [[2, 3, -1]]       # enough of them: nothing is mined
    assert pool([[3, 2]], 3) == [[2, 3, 1]]        # one is missing
    assert pool([[]], 2) == [[1, 2, 3]]
    assert pool([[3, 2]], 2, depth=1) == [[2]]


def test_an_embedding_that_is_not_finite_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mining, "TEXTS", 2)                # it is the second of the second part
    vectors = EYE.copy()
    vectors[3, 1] = np.nan
    miner = mining.Miner(tmp_path, SimpleNamespace(dim=4))
    with pytest.raises(ValueError, match="clr.passages: the embedding of text number 3 is"):
        miner._embed("clr.passages", 4, lambda first, end: vectors[first:end])


def test_mining_where_every_passage_is_a_positive():
    one = np.ones((1, 1), dtype=np.float32)
    assert mine(one, one, [[0]], 3)[0].tolist() == [[-1, -1, -1]]
    assert mine(np.ones((0, 1), np.float32), one, [], 3)[0].shape == (0, 3)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block", [7, 65_536])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_give_the_plain_search_ties_by_number(monkeypatch, device, block, seed):
    """Small whole numbers as vectors: sums are exact in 16 bits too, and many scores are equal."""
    monkeypatch.setattr(mining, "BLOCK", block)
    monkeypatch.setattr(mining, "CHUNK", 8)
    rng = np.random.default_rng(seed)
    queries = rng.integers(-2, 3, (30, 3)).astype(np.float32)
    passages = rng.integers(-2, 3, (60, 3)).astype(np.float32)
    positives = [rng.choice(60, rng.integers(1, 4), replace=False).tolist() for _ in queries]
    given = [[n for n in rng.choice(60, rng.integers(0, 6), replace=False).tolist()
              if n not in p] for p in positives]
    for depth, n_given in ((5, 3), (70, 2), (1, 1)):
        pool, scores = mine(queries, passages, positives, depth, given=given, n_given=n_given)
        assert np.array_equal(pool, plain(queries, passages, positives, depth, given, n_given))
        exact = np.take_along_axis(queries @ passages.T, pool.clip(min=0), 1)
        assert np.array_equal(scores, np.where(pool < 0, 0, exact))
        for left, right in (("f4", "f2"), ("f2", "f4"), ("f2", "f2")):     # either may be large
            half = mine(queries.astype(left), Exact(passages.astype(right), device), positives,
                        depth, given=given, n_given=n_given)[0]
            assert np.array_equal(half, pool)


def test_rows_that_bring_cosines_lose_repeats_and_what_answers_their_query(tmp_path):
    rows = [{"query": "q", "pos": ["a"], "neg": ["b", "c", "b", "d"],
             "cosines": [0.75, 0.7, 0.1, 0.5]},
            {"query": "q", "pos": ["c"], "neg": ["d"], "cosines": [0.25]}]
    files = JsonlFiles([write_lines(tmp_path / "a.jsonl", rows)], parse_pair, tmp_path, ids=True)
    passages = Passages(files)
    pool, cosines = mining.Miner(tmp_path / "mining", None).of_rows("x", passages, 3)
    b, d = passages.numbers([text_id("b"), text_id("d")])
    assert pool.tolist() == [[b, d, -1], [d, -1, -1]]      # "c" answers the same query elsewhere
    assert cosines.tolist() == [[0.75, 0.5, 0], [0.25, 0, 0]]


@pytest.mark.extras
def test_of_what_faiss_does_not_find_nothing_is_made_up(tmp_path):
    """Its -1 is no passage; a query's own one is left out, and one that needs none gets none."""
    pytest.importorskip("faiss")
    passages = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)
    search = mining.Approximate(passages, tmp_path / "index")
    search.index.nprobe = 1                                # of 14 cells
    numbers, cosines = search.nearest(passages[:2], [[0], [1]], 200, [True, False])
    n = int((numbers[0] >= 0).sum())
    assert 0 < n < 100 and 0 not in numbers[0] and len(set(numbers[0, :n].tolist())) == n
    assert np.allclose(cosines[0, :n], passages[numbers[0, :n]] @ passages[0], atol=1e-5)
    assert (np.diff(cosines[0, :n]) <= 0).all() and np.isneginf(cosines[0, n:]).all()
    assert (numbers[1] == -1).all()


# ---------------------------------------------------------------- files that ranks fill together

def test_a_broken_fill_continues_and_does_nothing_twice(tmp_path):
    calls = []

    def work(first, end):
        if len(calls) == 2:
            raise OSError("no space left")
        calls.append((first, end))
        return np.arange(first, end, dtype=np.float32)[:, None] * [1, 10]
    with pytest.raises(OSError, match="no space left"):
        mining.shared(tmp_path / "a", (10, 2), np.float32, 4, work)
    calls[:] = [*calls, None]
    out = mining.shared(tmp_path / "a", (10, 2), np.float32, 4, work)
    assert calls == [(0, 4), (4, 8), None, (8, 10)]
    assert out.tolist() == [[i, 10 * i] for i in range(10)]


@pytest.mark.parametrize("lost", ["a", "a.done"])
def test_a_file_without_its_notes_or_notes_without_their_file_are_made_anew(tmp_path, lost):
    for number in (1, 2):
        out = mining.shared(tmp_path / "a", (10, 2), np.float32, 4,
                            lambda first, end: np.full((end - first, 2), number))
        (tmp_path / lost).unlink()
    assert out.tolist() == [[2, 2]] * 10


def test_what_a_link_leads_to_is_cleared(tmp_path):
    (tmp_path / "far").mkdir()
    (tmp_path / "mining").symlink_to(tmp_path / "far")
    mining.shared(tmp_path / "mining" / "a", (10, 2), np.float32, 10,
                  lambda first, end: np.ones((10, 2)))
    mining.Miner(tmp_path / "mining", None).clear()
    assert not list((tmp_path / "far").iterdir())


def fill_on(world, path):
    def work(first, end):
        assert first // 3 % world.size == world.rank
        return np.arange(first, end)[:, None]
    out = mining.shared(path, (20, 1), np.int32, 3, work, world)
    assert out[:, 0].tolist() == list(range(20))


def test_ranks_fill_a_file_together(tmp_path):
    on_ranks(3, fill_on, tmp_path / "numbers")


@pytest.mark.parametrize("large, dtype", [(64, np.float32), (63, np.float16)])
def test_very_many_embeddings_lie_in_16_bits(tmp_path, monkeypatch, large, dtype):
    monkeypatch.setattr(mining, "LARGE", large)            # 4 x 4 numbers of 4 bytes
    found = mining.Miner(tmp_path, SimpleNamespace(dim=4))._embed(
        "x", 4, lambda first, end: EYE[first:end])
    assert found.dtype == dtype and found.tolist() == EYE.tolist()
