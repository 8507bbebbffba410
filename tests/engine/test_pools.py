"""A pool that is shared out answers as one pool does, and holds its own rows alone."""
import numpy as np
import pytest
import torch

from dhnm import HardNegativePool
from engine.distributed import ALONE
from engine.pools import pool_of
from ranks import assert_equal, on_ranks

Q, N, BATCH, STEPS = 25, 3, 12, 12


def candidates():
    """Return pools of 0 to 6 candidates, padded; no two have an id in common."""
    ids = np.arange(Q * 6, dtype=np.int32).reshape(Q, 6)
    return np.where(np.arange(6) < (np.arange(Q) * 5 % 7)[:, None], ids, -1)


def step(k):
    """Return the rows of step k, and their cosines, near Eq. 6's bounds."""
    rng = np.random.default_rng(k)
    return (torch.from_numpy(rng.permutation(Q)[:BATCH]),
            torch.from_numpy(rng.uniform(0.2, 1.0, (BATCH, N)).astype(np.float32)))


def drive(pool, world, steps):
    """Take steps with this rank's share of each; return (negatives, stats) of each."""
    share, seen = BATCH // world.size, []
    for k in steps:
        rows, scores = step(k)
        own = slice(world.rank * share, (world.rank + 1) * share)
        mine = pool.negatives(rows[own].numpy())
        pool.update(rows[own].numpy(), scores[own])
        seen.append((torch.cat(world.gather_objects(mine)), pool.stats()))
    return seen


def shared(world, folder):
    pool = pool_of(candidates(), world, N, "v2")
    seen = drive(pool, world, range(STEPS))
    if world.size > 1:
        assert len(pool.own.candidates) == len(range(world.rank, Q, world.size))
    state = pool.state_dict()
    if world.is_main:
        torch.save((seen, state), folder / f"{world.size}.pt")
    else:
        assert state == {}


def resumed(world, folder):
    _, state = torch.load(folder / "4.pt")
    pool = pool_of(state["candidates"], world, N, "v2")
    pool.load_state_dict(state)
    seen = drive(pool, world, range(STEPS, 2 * STEPS))
    if world.is_main:
        torch.save(seen, folder / "resumed.pt")


def assert_same(seen, wanted):
    for (negatives, stats), (right, numbers) in zip(seen, wanted, strict=True):
        assert negatives.tolist() == right.tolist() and stats == pytest.approx(numbers)


def test_ranks_answer_as_one_pool_and_resume_on_another_number(tmp_path):
    one = HardNegativePool(torch.from_numpy(candidates()), N)
    wanted = drive(one, ALONE, range(STEPS))
    state = one.state_dict()
    assert sum(stats["replaced"] for _, stats in wanted) > 20 and one.exhausted.any()
    for size in (1, 2, 4):
        on_ranks(size, shared, tmp_path)
        seen, found = torch.load(tmp_path / f"{size}.pt")
        assert_same(seen, wanted)
        assert_equal(found, state)
    on_ranks(3, resumed, tmp_path)
    assert_same(torch.load(tmp_path / "resumed.pt"), drive(one, ALONE, range(STEPS, 2 * STEPS)))


def more_ranks_than_rows(world):
    pool = pool_of(np.array([[5, 6], [7, 8]], dtype=np.int32), world, 1, "v2")
    rows, own = torch.arange(2), slice(world.rank, world.rank + 1)
    mine = pool.negatives(rows[own])
    assert mine.tolist() == ([[5]], [[7]], [])[world.rank]
    pool.update(rows[own], torch.tensor([[0.1], [0.9]])[own])
    assert pool.stats()["replaced"] == 1
    none = pool_of(np.full((2, 2), -1), world, 1, "v2")                # of negatives
    none.update(rows[own], torch.zeros(2, 1)[own])
    assert none.stats()["S"] == 0
    with pytest.raises(ValueError, match="not a finite number"):       # on every rank
        pool.update(rows[own], torch.tensor([[0.9], [float("nan")]])[own])


def test_a_rank_may_have_no_row_and_an_error_is_everyones():
    on_ranks(3, more_ranks_than_rows)
