"""An Ascend NPU stood in for by a device of the same name: torch_npu itself is not here.

What is checked is what this project asks of the device: selection, rank, autocast, backend, and
that no operation mixes what lies on it with what does not. What an NPU computes is not. The code of
CUDA runs here too, with flash attention written out.
"""

import os
import sys
import types
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import train
from embed import Embedder
from engine import distributed, flash, kernels
from engine.distributed import World
from ranks import STEPS, chain_arguments, log, step_loss_replaced
from test_flash import plain_flash, plain_flash_backward

# ---------------------------------------------------------------- the device

aten = torch.ops.aten
MOVES = (aten.copy_.default, aten._to_copy.default)
INDEXING = (aten.index.Tensor, aten.index_put_.default)


class OnCard(torch.Tensor):
    """A tensor that says that it lies on npu:0, and holds one of the CPU."""

    @staticmethod
    def __new__(cls, held):
        self = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=torch.device("npu", 0))
        self.held = held
        return self

    def tolist(self):
        return self.held.tolist()

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, *args, **(kwargs or {}))


def held(values):
    return tree_map(lambda x: x.held if isinstance(x, OnCard) else x, values)


def on_card(values):
    return tree_map(lambda x: OnCard(x) if isinstance(x, torch.Tensor) else x, values)


def compute(operation, *args, **kwargs):
    """Call an operation on the tensors that are held.

    Moves have tensors on either side. An index may lie on the CPU, and so may a number.
    """
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    is_any = any(isinstance(x, OnCard) for x in tensors)
    if is_any and operation not in MOVES:
        bound = tree_leaves((args[0], args[2:])) if operation in INDEXING else tensors
        strays = [x.shape for x in bound if isinstance(x, torch.Tensor) and x.dim()
                  and not isinstance(x, OnCard)]
        assert not strays, f"{operation} takes tensors of the CPU, {strays}, beside those of a card"
    device, ours = kwargs.get("device"), held(kwargs)
    to_card = is_any if device is None else torch.device(device).type == "npu"
    out = operation(*held(args), **(ours | {"device": "cpu"} if device is not None else ours))
    if not to_card:
        return out
    out = on_card(out)
    return return_and_correct_aliasing(operation, args, kwargs, out) if is_any else out


def empty_strided(size, stride, dtype=None, **_):
    return OnCard(torch.empty_strided(size, stride, dtype=dtype))


def copy_from(source, to, non_blocking=False):
    held(to).copy_(held(source))
    return to


def in_16_bits(operation, *args, **kwargs):
    """Call an operation as autocast does: on tensors in bfloat16."""
    with torch.autocast("npu", enabled=False):
        return operation(*tree_map(
            lambda x: x.bfloat16() if isinstance(x, torch.Tensor) else x, args), **kwargs)


CARD = types.ModuleType("torch.npu")
CARD.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
CARD.is_available, CARD._is_in_bad_fork = lambda: True, lambda: False
CARD.manual_seed_all = lambda seed: None
CARD.max_memory_allocated = lambda: 2e9
CARD.get_device_name = lambda index: "Ascend 910B4"
_setup_privateuseone_for_python_backend("npu", CARD)       # in the manner of torch_npu's first line
EVERY, SOME = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
EVERY.fallback(compute, "PrivateUse1")
EVERY.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
SOME.impl("empty_strided", empty_strided, "PrivateUse1")   # of torch.tensor, as the next one
SOME.impl("_copy_from", copy_from, "PrivateUse1")
for name in ("linear", "matmul", "scaled_dot_product_attention"):
    SOME.impl(name, partial(in_16_bits, getattr(aten, name)), "AutocastPrivateUse1")


@pytest.fixture
def npu(monkeypatch):
    """Put a `torch_npu` in place whose `torch.npu` remembers what it was asked."""
    CARD.asked = []
    CARD.is_available = lambda: True
    CARD.set_device = lambda index: CARD.asked.append(("device", index))
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return CARD


# ---------------------------------------------------------------- all four stages on it

def flash_forward(qkv, span):
    """Check what flash attention asks of its tensors; return what it does."""
    for x in qkv:
        assert isinstance(x, OnCard) and x.dtype == torch.bfloat16
        assert x.stride(-1) == 1 and x.shape[-1] % 8 == 0
    assert isinstance(span.starts, OnCard) and span.starts.dtype == torch.int32
    with torch.autocast("npu", enabled=False):
        out, lse = plain_flash([x.double() for x in held(qkv)], held_span(span))
    return on_card((out.bfloat16(), lse.float()))


def flash_backward(grad, qkv, out, lse, span):
    """Check what the backward pass of flash attention asks of its tensors; return what it does."""
    for x in (grad, out, *qkv):
        assert isinstance(x, OnCard) and x.dtype == torch.bfloat16 and x.stride(-1) == 1
    assert isinstance(lse, OnCard) and lse.dtype == torch.float32
    grad, out, lse, *qkv = (x.double() for x in held((grad, out, lse, *qkv)))
    return on_card(tuple(x.bfloat16() for x in plain_flash_backward(
        grad, qkv, out, lse, held_span(span))))


def held_span(span):
    return flash.Span(held(span.starts), span.longest, span.see, span.scale)


def dies_in_stage_4(real, model, batch, cfg, step):
    if cfg.stage == "embed_sup" and step == 4:
        raise KeyboardInterrupt
    return real(model, batch, cfg, step)


def losses(rows, out, *options):
    """Train all stages, the last in two runs; return the loss of each step, stage after stage."""
    argv = chain_arguments(rows, "embed_sup", out, "--save_every=2", *options)
    with step_loss_replaced(dies_in_stage_4), pytest.raises(KeyboardInterrupt):
        train.main(argv)
    train.main(argv)
    return [log(out, stage)[step + 1]["loss"] for stage in train.STAGES for step in range(STEPS)]


@pytest.fixture(scope="module")
def on_cpu(rows, tmp_path_factory):
    return losses(rows, tmp_path_factory.mktemp("cpu"))


@pytest.mark.parametrize("dtype, close", [("float32", 1e-3), ("bfloat16", 0.05)])
def test_all_stages_on_a_card_are_those_of_a_cpu(npu, rows, on_cpu, tmp_path, dtype, close):
    got = losses(rows, tmp_path, "--device=npu", f"--dtype={dtype}", "--micro_batch_size=5")
    assert got == pytest.approx(on_cpu, rel=close)
    vectors = [Embedder(tmp_path / "embed_sup", device, dtype).encode(["sort a list"])
               for device in ("npu", "cpu")]
    assert vectors[0] == pytest.approx(vectors[1], abs=close)
    assert log(tmp_path, "embed_sup")[1]["device_gb"] == 2


def test_all_stages_by_the_code_of_cuda(npu, rows, on_cpu, tmp_path, monkeypatch):
    """Packed texts and both calls of the soft mask, on a card but for the kernel itself."""
    monkeypatch.setattr(kernels, "takes_packed_texts",
                        lambda device, dtype, mask: dtype == torch.bfloat16)
    monkeypatch.setattr(flash, "flash", flash_forward)
    monkeypatch.setattr(flash, "flash_backward", flash_backward)
    got = losses(rows, tmp_path, "--device=npu", "--dtype=bfloat16", "--checkpointing=1")
    assert got == pytest.approx(on_cpu, rel=0.05)


# ---------------------------------------------------------------- what is asked of it

def test_an_npu_is_found_without_being_named(npu, monkeypatch):
    assert distributed.accelerator() == "npu"
    assert distributed.device_module("npu") is npu
    assert distributed.choose_dtype("auto", torch.device("npu")) == "bfloat16"
    npu.is_available = lambda: False                       # the package, and no card
    assert distributed.accelerator() == "cpu"
    with pytest.raises(ValueError, match="'npu' is not available on this machine"):
        distributed.device_module("npu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert distributed.accelerator() == "cuda"


@pytest.mark.parametrize("device", ["auto", "npu"])
def test_ranks_take_their_card_and_meet_by_hccl(npu, monkeypatch, device):
    for name, value in (("RANK", 11), ("WORLD_SIZE", 16), ("LOCAL_RANK", 3),
                        ("LOCAL_WORLD_SIZE", 1)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    met = []
    monkeypatch.setattr(dist, "init_process_group", met.append)
    backend = types.SimpleNamespace(_set_default_timeout=met.append)     # of gloo alone
    monkeypatch.setattr(dist, "group", types.SimpleNamespace(WORLD=types.SimpleNamespace(
        _get_backend={torch.device("cpu"): backend}.__getitem__)))
    world = distributed.start(device)
    assert met == ["cpu:gloo,npu:hccl", distributed.PATIENCE] and npu.asked == [("device", 3)]
    assert (world.rank, world.size, world.device) == (11, 16, torch.device("npu", 3))
    assert torch.get_num_threads() == len(os.sched_getaffinity(0))


def test_one_card_needs_no_process_group(npu, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *_: pytest.fail("nobody to meet"))
    assert distributed.start("npu") == World(0, 1, torch.device("npu", 0))


def test_autocast_is_the_cards(npu):
    world = World(0, 1, torch.device("npu", 0))
    with world.autocast("bfloat16"):
        assert torch.is_autocast_enabled("npu") and not torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("npu") == torch.bfloat16
    with world.autocast("float32"):
        assert not torch.is_autocast_enabled("npu")


def test_without_torch_npu_there_is_no_npu(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_npu", None)    # an import of it fails
    monkeypatch.delattr(torch, "npu", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.accelerator() == "cpu"
    with pytest.raises(ValueError, match="'npu' is not available on this machine"):
        distributed.start("npu")
