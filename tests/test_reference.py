"""The losses of 100 steps of each stage are those that were written down.

    pytest tests/test_reference.py --record=tests/reference/losses.json    # after a meant change

A tiny model on made-up rows, one thread, float32. Another CPU or another version of torch sums in
another order. What such differences grow to in 100 steps is measured here by starting from weights
that are off by one part in 10^6, ten times a rounding error; TOLERANCE is above that, and far below
what a real change does: a seed, or a warm-up twice as long.
"""
import json
from pathlib import Path

import pytest
import torch

import train
from model import Conan
from ranks import arguments, log

STEPS, TOLERANCE = 100, 1e-3
REFERENCE = Path(__file__).parent / "reference" / "losses.json"


def losses_of(rows, stage, out, *more):
    rate = 1e-3 if stage in ("pretrain", "sft") else 2e-4          # else the last losses are 0
    train.main(arguments(rows, stage, out, f"--steps={STEPS}", f"--save_every={STEPS}",
                         f"--learning_rate={rate}", *more))
    lines = log(out, stage)
    return torch.tensor([lines[step]["loss"] for step in range(1, STEPS + 1)], dtype=torch.float64)


def apart(a, b):
    """Return the largest difference, relative where the loss is above 1."""
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())


@pytest.mark.parametrize("stage", train.STAGES)
def test_the_losses_of_100_steps(rows, tmp_path, record, request, stage):
    losses = losses_of(rows, stage, tmp_path)
    assert len(losses) == STEPS
    if request.config.getoption("--record"):
        record[stage] = [round(x, 6) for x in losses.tolist()]
        return
    wanted = torch.tensor(json.loads(REFERENCE.read_text())[stage], dtype=torch.float64)
    assert wanted[-9:].mean() < 0.7 * wanted[:9].mean()        # it learns
    assert apart(losses, wanted) < TOLERANCE, [
        (step, *pair) for step, pair in enumerate(zip(losses.tolist(), wanted.tolist()), 1)
        if abs(pair[0] - pair[1]) > TOLERANCE][:3]


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_the_tolerance_is_above_rounding_and_below_a_change(rows, tmp_path, monkeypatch, stage):
    wanted = torch.tensor(json.loads(REFERENCE.read_text())[stage], dtype=torch.float64)
    assert apart(losses_of(rows, stage, tmp_path / "a", "--seed=2"), wanted) > 10 * TOLERANCE
    assert apart(losses_of(rows, stage, tmp_path / "b", "--warmup=0.1"), wanted) > TOLERANCE
    real = Conan.init_weights

    def nearly(model, *args):
        real(model, *args)
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
        return model
    monkeypatch.setattr(Conan, "init_weights", nearly)
    moved = apart(losses_of(rows, stage, tmp_path / "c"), wanted)
    print(f"{stage}: {moved:.1e}")
    assert 0 < moved < TOLERANCE / 3
