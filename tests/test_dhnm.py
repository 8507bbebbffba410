"""Eq. (6) as a truth table with its boundaries, and pools whose whole history is worked by hand."""

import math

import pytest
import torch

from dhnm import HardNegativePool, should_replace


# ---------------------------------------------------------------- Eq. (6)

def below(x):
    """The float32 just below x."""
    return torch.nextafter(torch.tensor(x), torch.tensor(-2.0)).item()


@pytest.mark.parametrize("initial, current, replace", [
    # first use: S = S_0
    (0.4, 0.4, False),                 # exactly 0.4 is not below it
    (below(0.4), below(0.4), True),
    (0.39, 0.39, True),
    (0.9, 0.9, False),
    (-0.2, -0.2, True),
    (-0.5, -0.5, True),                # |S_0| is not below 0.4, but 1.2 * -0.5 < -0.5
    (-0.8, -0.8, False),               # here |S| is not below 0.7 either: an opposite stays
    # later: 1.2 * S < S_0 and |S| < 0.7
    (0.6, 0.5, False),                 # 1.2 * 0.5 is exactly 0.6
    (0.6, below(0.5), True),
    (0.6, 0.55, False),                # fallen, but not by enough
    (0.6, 0.8, False),                 # got harder
    (0.9, 0.7, False),                 # 0.84 < 0.9, but 0.7 is not below 0.7
    (0.9, below(0.7), True),
    (0.9, 0.74, False),                # fallen, and still hard
    (0.6, 0.0, True),
    (0.3, 0.9, True),                  # S_0 below 0.4, whatever came later
    # negative S: the prose takes its absolute value
    (0.6, -0.69, True),
    (0.6, -0.7, False),                # |S| is exactly 0.7
    (0.6, -0.9, False),
])
def test_equation_6(initial, current, replace):
    got = should_replace(torch.tensor([initial]), torch.tensor([current]))
    assert got.dtype == torch.bool and got.tolist() == [replace]


# ---------------------------------------------------------------- a scripted history

def pool_of(*candidates, n=2, **settings):
    return HardNegativePool(list(candidates), n, **settings)


def show(pool, query, *scores):
    """One visit: these are the scores of the query's negatives; return what it uses next."""
    pool.update([query], torch.tensor([scores]))
    return pool.negatives([query])[0].tolist()


def test_a_history_by_hand():
    pool = pool_of([10, 11, 12, 13, 14], [20, 21, 22])
    assert set(pool.stats().values()) == {0}
    assert pool.negatives([1, 0]).tolist() == [[20, 21], [10, 11]]
    # first scores are S_0; 11 is below 0.4 from the start and 12 takes its place
    assert show(pool, 0, 0.80, 0.39) == [10, 12]
    # 10: 1.2 * 0.67 = 0.804 >= 0.80 stays. 12: its own S_0 is 0.6
    assert show(pool, 0, 0.67, 0.60) == [10, 12]
    # 10: 1.2 * 0.66 = 0.792 < 0.80, leaves. 12: 1.2 * 0.55 = 0.66 >= 0.60 stays
    assert show(pool, 0, 0.66, 0.55) == [13, 12]
    # 13 is below 0.4 at its own first use. 12 has fallen below 0.5
    assert show(pool, 0, 0.30, 0.49) == [14, 10]            # pool empty: 10, last at 0.66, is back
    assert pool.stats() == {"replaced": 2, "used": 1, "exhausted": 1, "S": pytest.approx(0.395),
                            "S_0": pytest.approx(0.45)}     # S_0 of 13 and 12: 0.30, 0.60
    # query 1 was not touched, and has its own history
    assert pool.negatives([1]).tolist() == [[20, 21]]
    assert show(pool, 1, 0.5, 0.5) == [20, 21]


def test_a_swapped_in_negative_is_judged_by_its_own_first_score():
    pool = pool_of([10, 11], n=1)
    assert show(pool, 0, 0.9) == [10]
    assert show(pool, 0, 0.5) == [11]                       # S_0 of 10 was 0.9
    assert show(pool, 0, 0.5) == [11]                       # for 11 the same score is its first
    assert pool.stats()["S_0"] == 0.5
    assert show(pool, 0, 0.42) == [11]                      # 0.504 >= 0.5
    assert show(pool, 0, 0.41) == [10]                      # 0.492 < 0.5; 10 was last at 0.5


def test_an_exhausted_pool_keeps_the_hardest_seen_and_counts():
    pool = pool_of([10, 11, 12], n=1)
    assert show(pool, 0, 0.30) == [11]
    assert show(pool, 0, 0.20) == [12]
    assert pool.stats()["exhausted"] == 0
    assert show(pool, 0, 0.25) == [10]                      # nothing left; 10 had 0.30
    assert pool.stats()["replaced"] == 1 and pool.stats()["exhausted"] == 1
    assert show(pool, 0, 0.35) == [10]                      # still the hardest, still below 0.4
    assert pool.stats()["replaced"] == 0 and pool.stats()["exhausted"] == 1
    assert show(pool, 0, 0.24) == [12]                      # 12 had 0.25
    assert show(pool, 0, 0.24) == [12]                      # 10 had as much, and is no harder
    assert pool.stats()["replaced"] == 0


def test_used_counts_swaps_that_a_step_trained_on():
    """A swap that no later visit sees has changed nothing."""
    pool = pool_of([10, 11, 12, 13, 14], [20, 21, 22])
    show(pool, 0, 0.1, 0.2)                                 # 12 and 13 come in ...
    assert (pool.stats()["replaced"], pool.stats()["used"]) == (2, 0)
    show(pool, 1, 0.8, 0.8)                                 # ... not in another query's step
    assert (pool.stats()["replaced"], pool.stats()["used"]) == (0, 0)
    show(pool, 0, 0.8, 0.3)                                 # both in use; 14 replaces 13
    assert (pool.stats()["replaced"], pool.stats()["used"]) == (1, 2)
    show(pool, 0, 0.8, 0.8)                                 # 12 was used before, 14 was not
    assert (pool.stats()["replaced"], pool.stats()["used"]) == (0, 1)
    show(pool, 0, 0.8, 0.8)
    assert pool.stats()["used"] == 0


# ---------------------------------------------------------------- the other policy

def test_fixed_never_replaces_but_counts():
    pool = pool_of([10, 11, 12], policy="fixed")
    for scores in ((0.1, 0.9), (0.0, 0.1), (-0.5, 0.2)):
        assert show(pool, 0, *scores) == [10, 11]
    assert pool.stats() == {"replaced": 0, "used": 0, "exhausted": 0, "S": pytest.approx(-0.15),
                            "S_0": pytest.approx(0.5)}


# ---------------------------------------------------------------- pools of every size

def test_a_pool_smaller_than_n_is_filled_up_with_minus_one():
    pool = pool_of([10], [], [30, 31, 32], n=2)
    assert pool.negatives([0, 1, 2]).tolist() == [[10, -1], [-1, -1], [30, 31]]
    # what the loss says about empty places is ignored, even if it is not a number
    pool.update([0, 1, 2], torch.tensor([[0.5, 0.0], [math.nan, 0.0], [0.7, 0.1]]))
    assert pool.negatives([0, 1, 2]).tolist() == [[10, -1], [-1, -1], [30, 32]]
    assert pool.stats() == {"replaced": 1, "used": 0, "exhausted": 0,
                            "S": pytest.approx(1.3 / 3), "S_0": pytest.approx(1.3 / 3)}
    pool.update([0], torch.tensor([[0.1, 0.0]]))            # the only candidate stays
    assert pool.negatives([0]).tolist() == [[10, -1]]
    assert pool.stats()["replaced"] == 0 and pool.stats()["exhausted"] == 1


def test_passage_0_is_a_candidate_like_any_other():
    pool = pool_of([10, 0, 11], [0], n=1)
    assert pool.negatives([0, 1]).tolist() == [[10], [0]]
    assert show(pool, 0, 0.1) == [0]
    assert pool_of([0], n=3).negatives([0]).tolist() == [[0, -1, -1]]


# ---------------------------------------------------------------- state

def test_a_restored_pool_makes_the_same_replacements(tmp_path):
    candidates = [[q * 10 + k for k in range(q + 1)] for q in range(8)]
    generator = torch.Generator().manual_seed(4)
    visits = [(torch.randperm(8, generator=generator)[:5], torch.rand(5, 3, generator=generator))
              for _ in range(30)]
    one, two = (HardNegativePool(candidates, 3) for _ in range(2))
    for query_ids, scores in visits[:12]:
        one.update(query_ids, scores)
    state = one.state_dict()
    torch.save(state, tmp_path / "pool.pt")
    kept = {name: value.clone() for name, value in state.items()}
    two.load_state_dict(torch.load(tmp_path / "pool.pt", weights_only=True))
    assert not torch.equal(two.negatives(range(8)),
                           HardNegativePool(candidates, 3).negatives(range(8)))
    for query_ids, scores in visits[12:]:
        one.update(query_ids, scores)
        two.update(query_ids, scores)
        assert one.stats() == two.stats()
        assert torch.equal(one.negatives(range(8)), two.negatives(range(8)))
    for name, value in one.state_dict().items():
        assert torch.equal(value.nan_to_num(-9), two.state_dict()[name].nan_to_num(-9)), name
    three = HardNegativePool(candidates, 3)
    three.load_state_dict(state)
    three.update(*visits[12])
    for name, value in state.items():                       # saved and loaded are copies
        assert torch.equal(value.nan_to_num(-9), kept[name].nan_to_num(-9)), name


def test_state_of_another_pool_is_refused():
    pool = pool_of([10, 11, 12])
    with pytest.raises(ValueError, match=r"\(1, 3\).*\(1, 2\)"):
        pool.load_state_dict(pool_of([10, 11, 12], n=3).state_dict())
    with pytest.raises(ValueError, match=r"\(2, 2\)"):
        pool.load_state_dict(pool_of([10], [11]).state_dict())
    with pytest.raises(ValueError, match=r"candidates \(1, 4\).*\(1, 3\)"):
        pool.load_state_dict(pool_of([10, 11, 12, 13]).state_dict())


# ---------------------------------------------------------------- what is refused

def test_a_score_that_is_not_a_number_changes_nothing():
    pool = pool_of([10, 11, 12])
    before = pool.state_dict()
    with pytest.raises(ValueError, match="finite"):
        pool.update([0], torch.tensor([[0.1, math.nan]]))
    torch.testing.assert_close(pool.state_dict(), before, rtol=0, atol=0, equal_nan=True)


def test_the_depth_is_that_of_the_deepest_pool():
    """train.py warns of pools that are no deeper than N: there is nothing to swap in."""
    assert pool_of([10], [30, 31, 32]).depth == 3 and pool_of([10]).depth == 2


def test_what_a_pool_refuses():
    pool = pool_of([10, 11, 12], [20, 21, 22])
    with pytest.raises(ValueError, match=r"\(1, 3\).*1 queries with 2"):
        pool.update([0], torch.zeros(1, 3))
    with pytest.raises(ValueError, match="twice"):
        pool.update([1, 1], torch.zeros(2, 2))
    with pytest.raises(ValueError, match="v3"):
        pool_of([10], policy="v3")


def test_scores_with_a_graph_in_any_precision_are_taken_as_numbers():
    pool = pool_of([10, 11, 12])
    scores = torch.tensor([[0.8, 0.3]], dtype=torch.bfloat16, requires_grad=True)
    pool.update(torch.tensor([0]), scores)
    assert pool.negatives([0]).tolist() == [[10, 12]]
    assert not any(value.requires_grad for value in pool.state_dict().values())


def test_400_random_steps_against_the_same_rules_on_lists():
    generator = torch.Generator().manual_seed(9)
    candidates = [list(range(100 * q, 100 * q + q)) for q in range(9)]      # 0 to 8 of them
    pool, n = HardNegativePool(candidates, 3), 3
    in_use = [ids[:n] for ids in candidates]
    unused = [ids[n:] for ids in candidates]
    first, last = [{} for _ in candidates], [{} for _ in candidates]
    for _ in range(400):
        queries = torch.randperm(9, generator=generator)[:4]
        scores = torch.rand(4, n, generator=generator) * 1.4 - 0.4
        pool.update(queries, scores)
        for q, row in zip(queries.tolist(), scores.tolist()):
            for negative, s in zip(in_use[q], row):
                first[q].setdefault(negative, s)
                last[q][negative] = s
            for slot, s in enumerate(row[:len(in_use[q])]):
                old = in_use[q][slot]
                s_0 = first[q][old]
                if not (abs(s_0) < 0.4 or (1.2 * s < s_0 and abs(s) < 0.7)):
                    continue
                if unused[q]:
                    new = unused[q].pop(0)
                else:
                    free = {c: x for c, x in last[q].items() if c == old or c not in in_use[q]}
                    new = max(free, key=free.get)
                if new != old:
                    in_use[q][slot] = new
                    first[q].pop(old), first[q].pop(new, None)
        want = [ids + [-1] * (n - len(ids)) for ids in in_use]
        assert pool.negatives(range(9)).tolist() == want
