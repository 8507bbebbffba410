"""Two gloo processes against one: gradients of InfoNCE and CoSENT, `World`.

The two processes run once for the whole file and leave what they found on disk.
"""

import os
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

from engine import distributed
from engine.distributed import World
from engine.encoders import SharedEncoder, prompt_of
from engine.microbatch import two_pass
from losses import cosent_loss, gather_with_grad, matryoshka
from mask import FULL, MaskSpec
from ranks import on_ranks, tiny_model
from tiny import nce

RANKS, B, N = 2, 8, 2              # processes, queries on all of them, hard negatives of each
CASES = ("hard negatives", "false negatives", "known positives", "matryoshka", "in-batch only",
         "soft mask", "cosent")


# ---------------------------------------------------------------- one step, on any number of ranks

def share(case, rows):
    """Return (texts, loss function) of a share of the batch; `rows` are its queries."""
    generator = torch.Generator().manual_seed(11)
    lengths = torch.randint(1, 12, (B, 2 + N), generator=generator)
    texts = [[torch.randint(0, 50, (int(n),), generator=generator) for n in row]
             for row in lengths]
    n = 0 if case == "in-batch only" else N
    b = len(rows)
    chosen = [texts[r][0] for r in rows] + [texts[r][1] for r in rows]
    chosen += [texts[r][2 + k] for r in rows for k in range(n)]
    ids = {}
    if case == "false negatives":      # each of them across the two ranks
        query_ids = torch.tensor([0, 1, 2, 3, 4, 1, 6, 7])
        positive_ids = torch.tensor([10, 11, 12, 13, 14, 15, 12, 17])
        negative_ids = torch.arange(20, 20 + B * N).view(B, N)
        negative_ids[0, 1], negative_ids[7, 0], negative_ids[2, 0] = 17, 10, -1
        ids = {"query_ids": query_ids[rows], "positive_ids": positive_ids[rows],
               "negative_ids": negative_ids[rows]}
    if case == "known positives":      # of one rank's queries, drawn or hard negatives on another
        known = torch.full((B, 2), -1)
        known[0, 1], known[5, 0], known[6, 1] = 15, 12, 20
        ids = {"known_ids": known[rows], "positive_ids": torch.arange(10, 10 + B)[rows],
               "negative_ids": torch.arange(20, 20 + B * N).view(B, N)[rows]}
    if case == "cosent":               # rank 0 alone has no order, and rank 1 hardly any
        score = torch.tensor([2.0, 2, 2, 2, 0, 5, 2, 5])[rows]

        def loss_fn(x):
            a, b = F.normalize(x).chunk(2)
            return cosent_loss((a * b).sum(1), score, temperature=0.1), x.new_zeros(len(a), 0)
        return chosen[:2 * len(rows)], loss_fn

    def loss_fn(x):
        query, positive, rest = x.split([b, b, b * n])
        dims = [8, 32] if case == "matryoshka" else [32]
        return matryoshka(partial(nce, temperature=0.1, **ids),
                          (query, positive, rest.view(b, n, x.shape[1])), dims)
    return chosen, loss_fn


def step(model, case, rows, micro, no_sync=None):
    """Backpropagate one step in chunks of `micro` texts; return its loss, scores and gradients."""
    texts, loss_fn = share(case, rows)
    chunks = [texts[i:i + micro] for i in range(0, len(texts), micro)]
    mask = MaskSpec(0.4) if case == "soft mask" else FULL
    model.zero_grad()
    out = two_pass(lambda c: model(torch.cat(c), [len(t) for t in c], mask), chunks,
                          loss_fn, *([no_sync] if no_sync else []))
    return {"loss": float(out[0]), "scores": out[1],
            "grads": {name.removeprefix("module."): p.grad.clone()
                      for name, p in model.named_parameters()}}


# ---------------------------------------------------------------- what each of the processes does

def worker(world, folder):
    parts = work(world)
    distributed.stop()
    torch.save(parts | {"threads": threads()}, f"{folder}/rank{world.rank}.pt")


def threads():
    """Return the names of the threads of this process, none where the system does not tell."""
    if not os.path.isdir("/proc/self/task"):
        return []
    return [open(f"/proc/self/task/{t}/comm").read().strip() for t in os.listdir("/proc/self/task")]


def work(world):
    """Do all that happens on a rank; return what came out."""
    rank = world.rank
    found = {"world": world_calls(world), "gather": gather_calls(rank)}

    model = distributed.parallelize(tiny_model(std=0.2), world)
    optimizer = torch.optim.AdamW(model.parameters())          # imports what held the group
    rows = list(range(rank * B // RANKS, (rank + 1) * B // RANKS))
    for case in CASES:
        for micro in (100, 5):         # one chunk, and several
            found[case, micro] = step(model, case, rows, micro, model.no_sync)
    optimizer.zero_grad()
    world.gather_objects(None)
    return found


def world_calls(world):
    """Call everything of `World`; return what came out."""
    rank = world.rank
    return {
        "is": (world.rank, world.size, str(world.device), world.is_main),
        "mean": world.mean({"a": rank + 1, "b": 10.0 * rank, "c": True}),
        "nan": world.mean({"a": float("nan") if rank else 1.0}),
        "objects": world.gather_objects({"rank": rank, "names": ["x"] * rank}),
        "alone": world.on_main(lambda: rank),
        "fails": [failure(world, error) for error in (TypeError("odd"), OSError("full"))],
    }


def failure(world, error):
    """Return what `on_main` raises on this rank if its work fails on the main one."""
    def fail():
        assert world.is_main
        raise error
    try:
        world.on_main(fail)
    except Exception as caught:
        return type(caught).__name__, str(caught)


def gather_calls(rank):
    """Gather (2, 1) of each rank; each rank weighs the rows differently."""
    x = torch.tensor([[1.0], [2.0]]) + 10 * rank
    x.requires_grad_()
    everyone = gather_with_grad(x)
    weights = torch.tensor([[1.0], [2.0], [3.0], [4.0]]) * (1 + 9 * rank)
    (everyone * weights + everyone).sum().backward()
    a, b = torch.zeros(2, 2, 1, requires_grad=True).unbind()
    for leaf in (a, b):
        leaf.retain_grad()
    ((gather_with_grad(a) + gather_with_grad(b)) * weights).sum().backward()
    for leaf in (a, b):                            # the gradient that comes in is one for both
        assert torch.equal(leaf.grad, x.grad - 2)
    return everyone.detach(), x.grad


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Run the two processes; return what each of them has found."""
    folder = tmp_path_factory.mktemp("ranks")
    on_ranks(RANKS, worker, str(folder))
    return [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(RANKS)]


# ---------------------------------------------------------------- equal to one big batch

@pytest.mark.parametrize("micro", [100, 5], ids=["one pass", "two passes"])
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_give_the_gradient_of_one_big_batch(found, case, micro):
    want = step(tiny_model(std=0.2), case, list(range(B)), micro=100)
    ranks = [f[case, micro] for f in found]
    assert sum(r["loss"] for r in ranks) / RANKS == pytest.approx(want["loss"], rel=1e-6)
    assert torch.allclose(torch.cat([r["scores"] for r in ranks]), want["scores"], atol=1e-6)
    got, right = (torch.cat([g.flatten() for g in x["grads"].values()]) for x in (ranks[0], want))
    assert right.norm() > 0.1 and (got - right).norm() < 1e-6 * right.norm()
    for name, grad in want["grads"].items():
        assert (ranks[0]["grads"][name] - grad).norm() < 5e-6 * grad.norm(), name
        assert torch.equal(ranks[0]["grads"][name], ranks[1]["grads"][name]), name


def test_the_cases_are_different(found):
    """Else the test above would hold for a loss that ignores negatives, ids, dims or mask."""
    losses = [round(step(tiny_model(std=0.2), case, list(range(B)), 100)["loss"], 4)
              for case in CASES]
    assert len(set(losses)) == len(CASES)
    # and half the batch is not the whole one
    assert abs(step(tiny_model(std=0.2), CASES[0], [0, 1, 2, 3], 100)["loss"] - losses[0]) > 0.05


def test_gather_by_hand(found):
    # rank 0 weighs the rows 1 2 3 4, rank 1 ten times that, and each adds 1: 11 w + 2
    for rank, (everyone, grad) in enumerate(f["gather"] for f in found):
        assert everyone.tolist() == [[1], [2], [11], [12]]
        assert grad.tolist() == [[[11 * 1 + 2], [11 * 2 + 2]], [[11 * 3 + 2], [11 * 4 + 2]]][rank]


def test_one_process_gathers_nothing():
    x = torch.randn(2, 3, requires_grad=True)
    assert gather_with_grad(x) is x


# ---------------------------------------------------------------- the end of a process

def test_no_thread_is_left_when_the_interpreter_goes_down(found):
    """One of gloo's would now and then abort a process that had done all it should."""
    for rank in found:
        assert not [name for name in rank["threads"] if "gloo" in name or "c10d" in name]


# ---------------------------------------------------------------- World

def test_what_ranks_tell_each_other(found):
    for rank, world in enumerate(f["world"] for f in found):
        assert world["is"] == (rank, 2, "cpu", rank == 0)
        assert world["mean"] == {"a": 1.5, "b": 5.0, "c": 1.0}
        assert np.isnan(world["nan"]["a"])
        assert world["objects"] == [{"rank": 0, "names": []}, {"rank": 1, "names": ["x"]}]
        assert world["alone"] == 0
        assert world["fails"] == [("TypeError", "odd"), ("OSError", "full")]


def test_one_process_needs_nobody():
    world = World(0, 1, torch.device("cpu"))
    model = tiny_model(std=0.2)
    assert world.is_main and world.mean({"a": 2}) == {"a": 2}
    assert world.gather_objects("x") == ["x"]
    assert world.on_main(lambda: 5) == 5 and failure(world, OSError("full")) == ("OSError", "full")
    assert distributed.parallelize(model, world) is model


def test_start_without_a_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # of a user: torchrun sets none for one
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    world = distributed.start("cpu")
    assert (world.rank, world.size, world.device) == (0, 1, torch.device("cpu"))
    assert torch.get_num_threads() == 1 and not dist.is_initialized()


@pytest.mark.parametrize("affinity", [True, False])
def test_cores_are_shared_among_the_processes_of_a_machine(monkeypatch, affinity):
    if affinity:
        monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)), raising=False)
    else:                                                   # macOS
        monkeypatch.delattr(os, "sched_getaffinity", raising=False)
        monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")              # of torchrun
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    distributed.start("cpu")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")              # of a user: torch has read it
    distributed.start("cpu")
    assert torch.get_num_threads() == 1


def test_autocast_follows_the_name():
    world = World(0, 1, torch.device("cpu"))
    x = torch.ones(2, 2)
    with world.autocast("bfloat16"):
        assert (x @ x).dtype == torch.bfloat16
    with world.autocast("float32"):
        assert (x @ x).dtype == torch.float32


# ---------------------------------------------------------------- devices

def test_devices():
    assert distributed.accelerator() in distributed.BACKENDS
    assert distributed.device_module("cpu") is None
    for kind in {"cuda", "npu"} - {distributed.accelerator()}:
        with pytest.raises(ValueError, match=f"'{kind}' is not available"):
            distributed.start(kind)


@pytest.mark.parametrize("flags, dtype", [({}, "float32"), ({"avx512_bf16": True}, "bfloat16"),
                                          ({"bf16": True}, "bfloat16"),
                                          ({"amx_bf16": True, "avx512_bf16": False}, "bfloat16")])
def test_bfloat16_is_chosen_where_a_cpu_is_fast_at_it(monkeypatch, flags, dtype):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: flags)
    assert distributed.choose_dtype("auto", torch.device("cpu")) == dtype
    assert distributed.choose_dtype("float32", torch.device("cpu")) == "float32"


@pytest.mark.parametrize("has_it, dtype", [(True, "bfloat16"), (False, "float32")])
def test_a_card_that_emulates_bfloat16_takes_float32(monkeypatch, has_it, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported",
                        lambda including_emulation=True: has_it or including_emulation)
    assert distributed.choose_dtype("auto", torch.device("cuda", 0)) == dtype


def fails_on(world):
    def work():
        if world.rank == 1:
            raise OSError("full")
    with pytest.raises(OSError, match="full") as caught:
        distributed.together(world, work)
    assert "in work" in caught.value.__notes__[0]          # where it was raised, on every rank


def test_an_error_of_one_rank_says_everywhere_where_it_was_raised():
    on_ranks(2, fails_on)


def encodes_on(world):
    seen = []

    def encode(texts, prompt):
        seen.extend(texts)
        return np.array([[float(text), len(prompt)] for text in texts]).reshape(-1, 2)
    def work(encoder):
        for n in (7, 3, 1):                                # of one text two ranks have none
            vectors = encoder.encode([str(i) for i in range(n)], prompt="ask")
            assert vectors.tolist() == [[i, 3] for i in range(n)] and vectors.dtype == np.float32
        assert prompt_of(encoder, "sts") == "p"
        return {"score": 1.0}
    encoder = SharedEncoder(SimpleNamespace(encode=encode, prompts={"sts": "p"}, dim=2), world)
    assert encoder.serve(work) == ({"score": 1.0} if world.is_main else {})
    assert len(seen) == sum(len(range(world.rank, n, 3)) for n in (7, 3, 1))
    with pytest.raises(ValueError, match="could not convert string to float: 'b'"):    # of rank 1
        encoder.serve(lambda encoder: encoder.encode(["1", "b", "2"], prompt="ask"))
    with pytest.raises(OSError, match="no such set"):
        encoder.serve(no_such_set)
    assert encoder.serve(lambda encoder: {"a": 1}) == ({"a": 1} if world.is_main else {})


def no_such_set(encoder):
    raise OSError("no such set")


def test_ranks_share_what_is_encoded():
    on_ranks(3, encodes_on)


def waits_on(world):
    assert world.on_main(lambda: time.sleep(4) or "done") == "done"


def test_ranks_meet_soon_or_fail_and_wait_long_for_the_main_one(monkeypatch):
    monkeypatch.setattr(dist.distributed_c10d, "default_pg_timeout", timedelta(seconds=2))
    on_ranks(2, waits_on)
    monkeypatch.setattr(distributed, "PATIENCE", timedelta(seconds=2))
    with pytest.raises(mp.ProcessRaisedException, match="Timed out|closed by peer"):
        on_ranks(2, waits_on)
