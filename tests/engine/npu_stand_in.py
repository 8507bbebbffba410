"""An Ascend NPU stood in for by a module of the same interface: torch_npu itself is not here.

What is checked is what this project asks of the device: selection, rank, autocast, backend. What
an NPU computes is not.
"""

import os
import sys
import types

import pytest
import torch
import torch.distributed as dist

from engine import distributed
from engine.distributed import World


@pytest.fixture
def npu(monkeypatch):
    """Put a `torch_npu` in place whose `torch.npu` remembers what it was asked."""
    torch.utils.rename_privateuse1_backend("npu")          # torch_npu's first line, too
    asked, module = [], types.ModuleType("torch.npu")
    module.asked = asked
    module.is_available = lambda: True
    module.set_device = lambda index: asked.append(("device", index))
    module.get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
    module._is_in_bad_fork = lambda: False
    monkeypatch.setitem(sys.modules, "torch_npu", types.ModuleType("torch_npu"))
    monkeypatch.setattr(torch, "npu", module, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return module


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
    monkeypatch.setattr(dist, "init_process_group",
                        lambda backend, timeout: met.append((backend, timeout)))
    world = distributed.start(device)
    assert met == [("cpu:gloo,npu:hccl", distributed.PATIENCE)] and npu.asked == [("device", 3)]
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
