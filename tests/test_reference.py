"""The losses of 100 steps of each stage are those that were written down.

    pytest tests/test_reference.py --record=tests/reference/losses.json    # after a meant change

A tiny model on made-up rows, one thread, float32. Another CPU or another version of torch sums in
another order. What such differences grow to in 100 steps is measured here by starting from weights
that are off by one part in 10^6, ten times a rounding error; TOLERANCE is above that, and far below
what a real change does: a seed, or a warm-up twice as long.
"""
import json
import os
from pathlib import Path

import pytest
import torch

import train
from model import Conan
from ranks import arguments, write_rows

STEPS, TOLERANCE = 100, 1e-3
REFERENCE = Path(__file__).parent / "reference" / "losses.json"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    before, folder = os.getcwd(), write_rows(tmp_path_factory.mktemp("rows"))
    os.chdir(folder)                   # the caches go to out/cache
    yield folder
    os.chdir(before)


def losses_of(files, stage, out, *more):
    argv = arguments(files, stage, out, f"--steps={STEPS}", f"--save_every={STEPS}", *more)
    train.main(argv)
    lines = [json.loads(line) for line in open(out / stage / "log.jsonl")]
    return torch.tensor([line["loss"] for line in lines], dtype=torch.float64)


def apart(a, b):
    """Return the largest difference, relative where the loss is above 1."""
    return float(((a - b).abs() / b.abs().clamp(min=1.0)).max())


@pytest.mark.parametrize("stage", train.STAGES)
def test_the_losses_of_100_steps(files, tmp_path, record, request, stage):
    found = losses_of(files, stage, tmp_path)
    assert len(found) == STEPS
    if request.config.getoption("--record"):
        record[stage] = [round(x, 6) for x in found.tolist()]
        return
    wanted = torch.tensor(json.loads(REFERENCE.read_text())[stage], dtype=torch.float64)
    assert wanted.max() - wanted.min() > 0.1                   # it learned, or was asked much
    assert apart(found, wanted) < TOLERANCE, [
        (step, *pair) for step, pair in enumerate(zip(found.tolist(), wanted.tolist()), 1)
        if abs(pair[0] - pair[1]) > TOLERANCE][:3]


@pytest.mark.slow
@pytest.mark.parametrize("stage", train.STAGES)
def test_the_tolerance_is_above_rounding_and_below_a_change(files, tmp_path, monkeypatch, stage):
    wanted = torch.tensor(json.loads(REFERENCE.read_text())[stage], dtype=torch.float64)
    assert apart(losses_of(files, stage, tmp_path / "a", "--seed=2"), wanted) > 10 * TOLERANCE
    assert apart(losses_of(files, stage, tmp_path / "b", "--warmup=0.1"), wanted) > TOLERANCE
    real = Conan.init_weights

    def nearly(model, *args):
        real(model, *args)
        with torch.no_grad():
            for p in model.parameters():
                p *= 1 + 1e-6 * torch.randn(p.shape, generator=torch.Generator().manual_seed(5))
        return model
    monkeypatch.setattr(Conan, "init_weights", nearly)
    moved = apart(losses_of(files, stage, tmp_path / "c"), wanted)
    print(f"{stage}: {moved:.1e}")
    assert 0 < moved < TOLERANCE / 3
