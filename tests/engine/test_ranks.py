"""A run moves between 1, 2, 3 and 4 ranks, in any order and mode; NaN on one rank stops all."""
import hashlib
import itertools
import json

import pytest
import torch

import train
from engine import checkpoint
from ranks import arguments, assert_equal, on_ranks, run, state_of, step_loss_replaced

SIZES, EACH = (1, 2, 3, 4), 2                      # steps between two moves
STEPS = EACH * len(SIZES)
ORDERS = list(itertools.permutations(SIZES))


def watched(world, argv, stop_at, seen):
    """Train up to `stop_at`, where the run falls over; note whose examples each rank gets."""
    def noted(real, model, batch, cfg, step):
        if step == stop_at:
            raise KeyboardInterrupt
        (seen / f"{step}_{world.rank}.json").write_text(json.dumps(
            [batch.task, *batch.rows.tolist()]))
        return real(model, batch, cfg, step)
    with step_loss_replaced(noted):
        try:
            run(world, argv)
        except KeyboardInterrupt:
            assert stop_at < STEPS


def travel(folder, rows, stage, sizes, modes=("ddp",)):
    """Train a stage on one number of ranks after the other.

    Returns (examples of each step, loss of each step, weights and trainer state at the end).
    """
    seen = folder / "seen"
    seen.mkdir(parents=True)
    for i, size in enumerate(sizes):
        argv = arguments(rows, stage, folder / "out", f"--steps={STEPS}", f"--save_every={EACH}",
                         f"--parallel={modes[i % len(modes)]}")
        stop_at = STEPS // len(sizes) * (i + 1)
        on_ranks(size, watched, argv, stop_at, seen)
    examples = []
    for step in range(STEPS):
        parts = [json.loads((seen / f"{step}_{rank}.json").read_text()) for rank in
                 range(sizes[step * len(sizes) // STEPS])]
        assert len({part[0] for part in parts}) == 1           # all ranks draw the same task
        examples.append([parts[0][0]] + [row for part in parts for row in part[1:]])
    lines = [json.loads(line) for line in open(folder / "out" / stage / "log.jsonl")]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses = torch.tensor([line["loss"] for line in lines], dtype=torch.float64)
    return examples, losses, [state_of(folder / "out", stage, name)
                              for name in ("model.pt", "trainer.pt")]


@pytest.fixture(scope="module")
def alone(rows, tmp_path_factory):
    """Return what a stage does on one rank that nobody disturbs."""
    found = {}

    def of(stage):
        if stage not in found:
            found[stage] = travel(tmp_path_factory.mktemp("alone"), rows, stage, [1])
        return found[stage]
    return of


def assert_same(found, alone, record, name):
    (examples, losses, state), (wanted, right, whole) = found, alone
    assert examples == wanted
    assert_equal(state, whole, close=(1e-3, 2e-5))
    worst = float(((losses - right) / right.abs().clamp(min=1.0)).abs().max())
    record[f"world sizes: {name}"] = worst
    assert worst < 1e-6, (losses - right).tolist()


def test_a_run_moves_between_numbers_of_ranks_and_modes(rows, alone, tmp_path, record):
    found = travel(tmp_path, rows, "embed_sup", (1, 3, 2, 4), ("ddp", "zero1", "fsdp", "ddp"))
    assert_same(found, alone("embed_sup"), record, "1, 3, 2, 4 ranks, changing modes")
    assert {task for task, *_ in found[0]} == {"retrieval", "classification", "sts"}
    assert len(set(alone("embed_sup")[1].tolist())) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero1", "fsdp"])
@pytest.mark.parametrize("stage", train.STAGES)
def test_numbers_of_ranks_in_any_order(rows, alone, tmp_path, record, stage, mode):
    """Each mode and stage in two of the 24 orders, so that all 24 are there."""
    first = 2 * (3 * train.STAGES.index(stage) + ["ddp", "zero1", "fsdp"].index(mode))
    for sizes in ORDERS[first:first + 2]:
        found = travel(tmp_path / "_".join(map(str, sizes)), rows, stage, sizes, (mode,))
        assert_same(found, alone(stage), record, f"{stage}, {mode}, {sizes}")


# ---------------------------------------------------------------- not a number, on one rank

def poisoned(world, argv, losses, gradients, folder):
    """Train with a loss, and a gradient, that are NaN in some steps, on rank 1 alone."""
    seen, end = [], ""

    def bad(real, model, batch, cfg, step):
        weights = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
        seen.append(hashlib.sha256(weights).hexdigest())
        loss, scores = real(model, batch, cfg, step)
        if world.rank == 1 and step in gradients:              # after the ranks have summed it
            next(model.parameters()).grad.view(-1)[3] = float("nan")
        return (loss * float("nan") if world.rank == 1 and step in losses else loss), scores
    with step_loss_replaced(bad):
        try:
            run(world, argv)
        except FloatingPointError as error:
            end = str(error)
    (folder / f"{world.rank}.json").write_text(json.dumps([seen, end]))


@pytest.mark.parametrize("mode", ["ddp", "zero1"])
def test_nan_on_one_rank_skips_the_step_on_all(rows, tmp_path, mode):
    argv = arguments(rows, "embed_sup", tmp_path / "out", "--steps=20", f"--parallel={mode}")
    on_ranks(2, poisoned, argv, {2, *range(7, 20)}, {4}, tmp_path)
    (here, end), (there, other) = (json.loads((tmp_path / f"{r}.json").read_text()) for r in (0, 1))
    assert here == there and len(here) == 17                   # weights at the start of each step
    skipped = [step for step in range(16) if here[step] == here[step + 1]]
    assert skipped == [2, 4, *range(7, 16)]                    # no update; nothing else is lost
    for text, rank in ((end, 0), (other, 1)):                  # ten in a row end the run
        assert "step 16, task " in text and "10 such steps in a row" in text
        assert f"nonfinite_step16_rank{rank}.pt" in text
    assert checkpoint.latest(tmp_path / "out/embed_sup").name == "step_000000"     # what was mined
