"""Eq. (3) and (4), App. C and the rank law: N - floor(alpha N), one more in the column reading."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mask import (CAUSAL, FULL, KINDS, MaskSpec, alpha, effective_rank, mask_rank, mask_weights,
                  rank_law, soft_mask)

ROOT = Path(__file__).parent.parent


# ---------------------------------------------------------------- schedules, Eq. (3) and App. C

@pytest.mark.parametrize("kind, quarters", [
    ("linear", [0, 1 / 4, 1 / 2, 3 / 4, 1]),
    ("accelerating", [0, 1 / 16, 1 / 4, 9 / 16, 1]),
    ("decelerating", [0, 7 / 16, 3 / 4, 15 / 16, 1]),
])
def test_schedules_at_quarters(kind, quarters):
    assert [alpha(t, 8, kind) for t in (0, 2, 4, 6, 8)] == quarters


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("total", [1, 3, 7, 1000])
def test_schedules_start_at_0_rise_and_stay_at_1(kind, total):
    values = [alpha(t, total, kind) for t in range(total + 1)]
    assert values[0] == 0.0 and values[-1] == 1.0
    assert all(a < b for a, b in zip(values, values[1:]))
    assert alpha(10 * total, total, kind) == alpha(0, 0, kind) == 1.0
    assert all(isinstance(value, float) for value in values)


# ---------------------------------------------------------------- the mask, Eq. (4)

def test_four_tokens_by_hand():
    # c = 0.25 * 4 = 1: row i holds 1 / i above the diagonal, column j holds 1 / j
    third = 1 / 3
    row = [[1, 1, 1, 1], [1, 1, 0.5, 0.5], [1, 1, 1, third], [1, 1, 1, 1]]
    col = [[1, 0.5, third, 0.25], [1, 1, third, 0.25], [1, 1, 1, 0.25], [1, 1, 1, 1]]
    assert torch.allclose(soft_mask(4, 0.25), torch.tensor(row).double(), atol=1e-7)
    assert torch.allclose(soft_mask(4, 0.25, "col"), torch.tensor(col).double(), atol=1e-7)
    assert (mask_rank(soft_mask(4, 0.25)), mask_rank(soft_mask(4, 0.25, "col"))) == (3, 4)


@pytest.mark.parametrize("axis", ["row", "col"])
@pytest.mark.parametrize("n", [1, 2, 5, 33])
def test_alpha_0_is_causal_and_alpha_1_bidirectional_exactly(n, axis):
    ones = torch.ones(n, n, dtype=torch.float64)
    assert torch.equal(soft_mask(n, 0.0, axis), ones.tril())
    assert torch.equal(soft_mask(n, 1.0, axis), ones)


@pytest.mark.parametrize("axis", ["row", "col"])
def test_opening_only_ever_opens(axis):
    alphas = [k / 40 for k in range(41)]
    masks = [soft_mask(20, a, axis) for a in alphas]
    for before, after in zip(masks, masks[1:]):
        assert (after >= before).all()
        assert (after > before).any() or (before == 1).all()
    assert all(m.min() >= 0 and m.max() <= 1 and m.dtype == torch.float64 for m in masks)
    ranks = [mask_rank(m) for m in masks]
    assert ranks == sorted(ranks, reverse=True) and ranks[0] == 20 and ranks[-1] == 1


def test_every_text_of_a_block_has_its_own_length():
    lengths = torch.tensor([3, 6, 5])
    i = torch.arange(6)
    for axis in ("row", "col"):
        block = mask_weights(i[:, None], i, lengths[:, None, None].double(), 0.4, axis)
        for m, n in zip(block, lengths.tolist()):
            assert torch.equal(m[:n, :n], soft_mask(n, 0.4, axis))
        assert not torch.equal(block[0, :3, :3], block[1, :3, :3])


# ---------------------------------------------------------------- rank

@pytest.mark.parametrize("n", [1, 2, 3, 8, 17, 64, 100, 129])
@pytest.mark.parametrize("axis, more", [("row", 0), ("col", 1)])
def test_rank_law(n, axis, more):
    """k = floor(alpha N): N at k = 0, 1 at k = N, else N - k for rows and N - k + 1 for columns."""
    for k in sorted({0, 1, 2, n // 3, n // 2, n - 2, n - 1, n} & set(range(n + 1))):
        law = n if k == 0 else 1 if k == n else n - k + more
        alphas = [k / n] if k == n else [k / n, (k + 0.5) / n, (k + 0.999) / n]
        for a in alphas:
            assert mask_rank(soft_mask(n, a, axis)) == law, (k, a)
            assert rank_law(n, a, axis) == law, (k, a)


def test_floor_survives_rounding():
    assert 0.29 * 100 < 29                                  # in floating point
    with pytest.raises(ValueError, match="axis 'column' is unknown"):
        rank_law(64, 0.5, "column")
    assert rank_law(100, 0.29) == mask_rank(soft_mask(100, 0.29)) == 71


def test_the_prose_is_off_by_one():
    # "the first i columns are all ones -> rank N - i": it is N - i + 1, as column 1 always is
    m = soft_mask(10, 0.3, "col")
    assert (m[:, :3] == 1).all() and (m[:, 3:] < 1).any(0).all()
    assert mask_rank(m) == 8


def test_rank_is_of_the_mask_whatever_its_dtype():
    assert mask_rank(torch.ones(5, 5).bool()) == 1
    assert mask_rank(torch.tensor([[1, 2], [2, 4]])) == 1


def test_effective_rank():
    assert effective_rank(torch.ones(7, 7)) == pytest.approx(1)
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    # singular values 3 and 1: p = 3/4, 1/4; exp(3/4 ln 4/3 + 1/4 ln 4) = 4 / 27^(1/4)
    assert effective_rank(torch.diag(torch.tensor([3.0, 1.0]))) == pytest.approx(4 / 27 ** 0.25)
    along = [effective_rank(soft_mask(32, k / 16)) for k in range(17)]
    assert along == sorted(along, reverse=True)


# ---------------------------------------------------------------- the mask of a forward pass

def test_spec_knows_when_no_tensor_is_needed():
    assert CAUSAL.is_causal and not CAUSAL.is_full
    assert FULL.is_full and not FULL.is_causal
    half = MaskSpec(0.5)
    assert not half.is_causal and not half.is_full
    assert not MaskSpec(0.0, apply="logits").is_causal
    assert MaskSpec(1.0, apply="logits").is_full


@pytest.mark.parametrize("wrong, text", [
    (lambda: alpha(1, 4, "cosine"), "cosine"),
    (lambda: alpha(-1, 4), "-1"),
    (lambda: alpha(1, -4), "-4"),
    (lambda: soft_mask(4, 1.1), "1.1"),
    (lambda: soft_mask(4, -0.1), "-0.1"),
    (lambda: soft_mask(4, math.nan), "nan"),
    (lambda: soft_mask(4, 0.5, "diagonal"), "diagonal"),
    (lambda: MaskSpec(alpha=2.0), "2.0"),
    (lambda: MaskSpec(alpha=math.nan), "nan"),
    (lambda: MaskSpec(axis="rows"), "rows"),
    (lambda: MaskSpec(apply="probabilities"), "probabilities"),
])
def test_bad_values_are_named(wrong, text):
    with pytest.raises(ValueError, match=text):
        wrong()


# ---------------------------------------------------------------- python mask.py

def test_the_command_prints_the_table():
    ran = subprocess.run([sys.executable, "mask.py"], cwd=ROOT, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    lines = [line.split() for line in ran.stdout.splitlines() if line.startswith(KINDS)]
    assert len(lines) == 3 * 2 * 9
    assert all(len(line) == 7 and line[4] == line[5] for line in lines)     # rank = law
    assert ["linear", "row", "4", "0.5000", "32", "32"] in [line[:6] for line in lines]
    assert ["linear", "col", "4", "0.5000", "33", "33"] in [line[:6] for line in lines]
