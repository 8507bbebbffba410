"""The order of examples: a permutation an epoch, tasks by weight, nothing from what came before."""
import numpy as np
import pytest

from engine.order import choice, shuffled, task_of_step


@pytest.mark.parametrize("n", [1, 2, 3, 8, 97, 1000])
def test_each_epoch_is_a_permutation_and_epochs_differ(n):
    epochs = shuffled(np.arange(3 * n), n, seed=5).reshape(3, n)
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    if n > 8:
        assert (epochs[0] != epochs[1]).any() and (epochs[0] != np.arange(n)).any()


def test_order_is_a_pure_function_of_position():
    """The bug of resumed runs that replay their data: a suffix must not depend on the prefix."""
    whole = shuffled(np.arange(500), 120, seed=3)
    assert (shuffled(np.arange(311, 500), 120, seed=3) == whole[311:]).all()
    assert (shuffled(np.arange(500), 120, seed=4) != whole).any()


def test_near_seeds_share_no_epoch():
    """A key of seed + epoch would make epoch 1 of seed 0 epoch 0 of seed 1."""
    epochs = {tuple(epoch) for seed in range(5)
              for epoch in shuffled(np.arange(600), 60, seed).reshape(10, 60).tolist()}
    assert len(epochs) == 50
    draws = {tuple(choice(5, seed, epoch, row) for row in range(20))
             for seed in range(5) for epoch in range(5)}
    assert len(draws) == 25
    one, two = (task_of_step(np.arange(99), [1, 1], seed)[0] for seed in (0, 1))
    assert (one[1:] != two[:-1]).any()


def test_a_billion_rows_need_no_list_of_them():
    far = shuffled([0, 1, 10 ** 12, 10 ** 12 + 1], 10 ** 9 + 7, seed=0)
    assert len(set(far.tolist())) == 4 and (far >= 0).all() and (far < 10 ** 9 + 7).all()


def test_neighbours_end_up_far_apart():
    place = shuffled(np.arange(4096), 4096, seed=0)
    assert np.corrcoef(place, np.arange(4096))[0, 1] == pytest.approx(0, abs=0.06)
    assert np.abs(np.diff(place)).mean() == pytest.approx(4096 / 3, rel=0.1)


def test_tasks_follow_their_weights_and_do_not_depend_on_the_start():
    draw, visits = task_of_step(np.arange(20_000), [3.0, 1.0, 0.0, 2.0], seed=1)
    share = np.bincount(draw, minlength=4) / len(draw)
    assert np.allclose(share, [0.5, 1 / 6, 0, 1 / 3], atol=0.015)
    later, _ = task_of_step(np.arange(900, 1000), [3.0, 1.0, 0.0, 2.0], 1)
    assert (later == draw[900:1000]).all()
    assert visits[:300].tolist() == [int((draw[:i] == draw[i]).sum()) for i in range(300)]


def test_a_row_draws_anew_in_each_epoch_and_evenly():
    draws = np.array([[choice(5, 0, epoch, row) for row in range(200)] for epoch in range(5)])
    assert np.allclose(np.bincount(draws.ravel()) / 1000, 0.2, atol=0.05)
    assert all((draws[0] != other).any() for other in draws[1:])
    assert choice(1, 0, 3, 9) == 0 and choice(5, 1, 2, 3) == choice(5, 1, 2, 3)


@pytest.mark.parametrize("seed", [0, 1, 2 ** 31, 2 ** 62])
def test_seeds_of_any_size(seed):
    assert sorted(shuffled(np.arange(100), 50, seed)[:50]) == list(range(50))
    assert task_of_step(np.arange(10), [1.0], seed)[0].tolist() == [0] * 10
    assert 0 <= choice(3, seed, 0, 0) < 3
