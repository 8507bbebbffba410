"""Training by DDP, ZeRO-1 and FSDP on several gloo processes against the same training on one.

Two processes run once: all modes, an LM stage and the supervised stage with hard negatives, DHNM,
mining and evaluation. What they leave on disk is compared with one process. Three and four are in
test_ranks.py.
"""
import json

import pytest
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import data
import train
from engine import distributed
from engine import run as runs
from ranks import (STEPS, arguments, assert_equal, log, on_ranks, run, state_of, step_loss_replaced,
                   tiny_model)
from tiny import Largest

MODES = ("ddp", "zero1", "fsdp")
STAGES = {"sft": [], "embed_sup": ["--dims=8,32"]}


def train_stage(world, rows, out, stage, *more):
    """Train a stage with all that belongs to it: mining, DHNM, evaluation."""
    run(world, arguments(rows, stage, rows / out, "--save_every=2", "--learning_rate=0.003",
                         f"--evaluate={rows / 'little' / 'test'}", *STAGES[stage], *more))


def gradients_lie_in_buckets(real, model, batch, cfg, step):
    """DDP's are zeroed, not dropped: else a backward without synchronisation made others."""
    if step and cfg.parallel in ("ddp", "zero1"):
        assert not any(p.grad is None or p.grad.any() for p in model.parameters())
    return real(model, batch, cfg, step)


def gradients_go_once(real, model, batch, cfg, step):
    """DDP's lie in buckets that it forms anew before its second step."""
    if cfg.parallel in ("ddp", "zero1"):
        gone = [p.grad is None for p in model.parameters()]
        assert all(gone) if step < 2 else not any(gone)
    return real(model, batch, cfg, step)


def on_each_rank(world, rows):
    """Do all that happens on several ranks."""
    for mode in MODES:
        with step_loss_replaced(gradients_go_once):
            for stage in STAGES:
                train_stage(world, rows, f"{mode}2", stage, f"--parallel={mode}")
        with step_loss_replaced(gradients_lie_in_buckets):
            train_stage(world, rows, f"{mode}2_micro", "embed_sup", f"--parallel={mode}",
                        "--micro_batch_size=9")
    torch.save({"syncs": synchronisations(world),
                "unequal": unequal_ranks(world), "built": built(world)},
               rows / f"of_rank_{world.rank}.pt")


def synchronisations(world):
    """Return {(texts of a micro batch, contrastive or not): synchronisations in one ddp step}."""
    model, found, buckets = distributed.parallelize(tiny_model(), world), {}, []

    def count(state, bucket):
        buckets.append(bucket.is_last())
        return allreduce_hook(None, bucket)
    model.register_comm_hook(None, count)
    ids, lengths = torch.arange(24) % 7, [4] * 6
    for micro in (0, 2):
        for targets in (None, ids):
            batch = data.Batch("", ids, lengths, None, targets,
                                     query_ids=torch.arange(3), positive_ids=torch.arange(3) + 5)
            cfg = train.TrainConfig(stage="pretrain" if targets is not None else "embed_weak",
                                    n_embd=32, n_head=4, micro_batch_size=micro)
            buckets.clear()
            train.step_loss(model, batch, cfg, 0)
            found[micro, targets is None] = sum(buckets)
            model.zero_grad()
    return found


def unequal_ranks(world):
    """Take a two-pass step under fsdp whose hard negatives are all on the first rank.

    The other ranks' are empty texts.
    """
    model = distributed.parallelize(tiny_model(), world, "fsdp")
    absent = world.rank > 0
    lengths = [4] * 6 + [1 if absent else 4] * 6       # 3 queries, 3 positives, 2 negatives of each
    ids = torch.full((3, 2), -1) if absent else torch.arange(6).view(3, 2) + 20
    batch = data.Batch("", torch.arange(sum(lengths)) % 7, lengths, None, negative_ids=ids,
                             query_ids=torch.arange(3) + 10 * world.rank,
                             positive_ids=torch.arange(3) + 5 + 10 * world.rank)
    cfg = train.TrainConfig(stage="embed_sup", n_embd=32, n_head=4, micro_batch_size=3)
    loss, scores = train.step_loss(model, batch, cfg, 0)
    return float(loss), scores, len(list(batch.chunks(3)))


def built(world):
    """Build an fsdp model from random numbers and from weights; return what each rank holds."""
    cfg = train.TrainConfig(stage="pretrain", parallel="fsdp", seed=5, n_embd=30, n_head=3,
                            n_kv_head=1, n_layer=2, ffn_dim=47, vocab_size=401)    # uneven shards
    parts = {}
    for name in ("random", "weights"):
        weights, state = None, runs.State(cfg, world, None, "float32", {})
        if name == "weights":
            whole = train.Conan(cfg.model_config()).init_weights(torch.Generator().manual_seed(9))
            weights = whole.state_dict() if world.is_main else {}
        with Largest() as seen:
            train.build_model(state, weights)
        parts[name] = {"held": sum(p.to_local().numel() for p in state.model.parameters()),
                       "largest": seen.numel,
                       "whole": distributed.gather_state(state.model.state_dict(), world)}
        copy = distributed.whole_model(state.model, world)
        assert type(copy) is train.Conan
        parts[name]["copy"] = copy.state_dict()
    return parts


# ---------------------------------------------------------------- what is compared

def assert_same(rows, out, stage="embed_sup", of="one1"):
    """A run's log, weights, optimizer state, pools and scores are those of another."""
    here, there = log(rows / out, stage), log(rows / of, stage)
    assert sorted(here) == sorted(there) == list(range(1, STEPS + 1))
    for step, line in there.items():
        for key, value in line.items():
            close = pytest.approx(value, rel=1e-4, abs=1e-6) if isinstance(value, float) else value
            assert here[step][key] == close, (step, key)
    for file in ("model.pt", "trainer.pt"):
        one, other = (state_of(rows / name, stage, file) for name in (out, of))
        assert_equal(one, other, close=(1e-3, 2e-5), where=file)
    one, other = (json.loads((rows / name / stage / "eval.json").read_text())
                  for name in (out, of))
    assert one == pytest.approx(other, abs=1e-6)


@pytest.fixture(scope="module")
def folder(rows):
    """Run all stages on one process, then everything on two."""
    alone = distributed.ALONE
    for stage in STAGES:
        train_stage(alone, rows, "one1", stage)
    on_ranks(2, on_each_rank, rows)
    return rows


@pytest.fixture(scope="module")
def of_ranks(folder):
    return [torch.load(folder / f"of_rank_{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_as_one_does(folder, mode, stage):
    assert_same(folder, f"{mode}2", stage)


def test_the_run_is_worth_comparing(folder):
    """Else the test above would hold for a run in which nothing moves."""
    lines = log(folder / "one1", "embed_sup")
    assert len({line["task"] for line in lines.values()}) > 1
    assert sum(line.get("replaced", 0) for line in lines.values()) >= 3
    assert max(line["grad_norm"] for line in lines.values()) > train.GRAD_CLIP
    lines = log(folder / "one1", "sft")
    assert lines[6]["loss"] < lines[1]["loss"]


@pytest.mark.parametrize("mode", MODES)
def test_micro_batches_change_nothing(folder, mode):
    assert_same(folder, f"{mode}2_micro")


def test_gradients_are_synchronised_once_a_step(of_ranks):
    for rank in of_ranks:
        assert list(rank["syncs"].values()) == [1] * 4


def test_ranks_with_unequal_numbers_of_negatives_take_the_same_number_of_passes(of_ranks):
    """Else one rank waits for ever for the other's next chunk."""
    assert [rank["unequal"][2] for rank in of_ranks] == [4, 4]     # of 12 places, absent ones too
    assert all(rank["unequal"][0] > 0 for rank in of_ranks)
    assert of_ranks[0]["unequal"][1].abs().min() > 0


def test_fsdp_ranks_never_hold_the_model_and_start_from_the_same_weights(of_ranks):
    shape = train.ConanConfig(n_embd=30, n_head=3, n_kv_head=1, ffn_dim=47, n_layer=2,
                              vocab_size=401, block_size=1024)
    for name, seed in (("random", 5), ("weights", 9)):
        model = train.Conan(shape).init_weights(torch.Generator().manual_seed(seed))
        parts = [rank["built"][name] for rank in of_ranks]
        assert sum(part["held"] for part in parts) == model.count_params()
        assert max(part["held"] for part in parts) < 0.52 * model.count_params()
        # one tensor at a time: the largest is the embedding, and the blocks are as large together
        assert max(part["largest"] for part in parts) == 401 * 30 < 0.6 * model.count_params()
        assert_equal(parts[0]["whole"], dict(model.state_dict()))
        for part in parts:                         # with which each rank mines by itself
            assert_equal(dict(part["copy"]), dict(model.state_dict()))
