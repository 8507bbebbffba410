"""Devices, ranks and data parallelism, applied from outside: the model knows nothing of them.

PAPER App. A trains on Ascend 910B with mixed precision. Here a device is a name (cuda, npu, cpu)
and a backend follows from it (nccl, hccl, gloo); there is no fork of the code anywhere else. `npu`
comes with torch_npu, which registers `torch.npu` when it is imported.
"""
import contextlib
import ctypes
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

BACKENDS = {"cuda": "nccl", "npu": "hccl", "cpu": "gloo"}


def accelerator():
    """Return the best device type of this machine: "cuda", "npu" or "cpu"."""
    if torch.cuda.is_available():
        return "cuda"
    try:
        import torch_npu  # noqa: F401  registers torch.npu
    except ImportError:
        return "cpu"
    return "npu" if torch.npu.is_available() else "cpu"


def device_module(kind):
    """Return torch.cuda or torch.npu, or None for the CPU."""
    if kind == "cpu":
        return None
    if kind not in BACKENDS:
        raise ValueError(f"device {kind!r} is unknown; choose one of {', '.join(BACKENDS)}")
    if kind == "npu":
        accelerator()                          # imports torch_npu, if there is one
    module = getattr(torch, kind, None)
    if module is None or not module.is_available():
        raise ValueError(f"device {kind!r} is not available on this machine")
    return module


def has_fast_bf16(kind):
    """Tell whether bfloat16 matmuls are in hardware: every accelerator, and CPUs with the unit."""
    if kind != "cpu":
        return kind != "cuda" or torch.cuda.is_bf16_supported()
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("bf16"))


@dataclass
class World:
    """This process among the others, and the device that it computes on."""
    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self):
        """Whether this rank prints and writes."""
        return self.rank == 0

    def autocast(self, dtype):
        """Return the autocast context for "bfloat16", or one that does nothing for "float32"."""
        if dtype == "float32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)

    def mean(self, values):
        """Return {name: mean over ranks} of a dict of numbers with the same keys on every rank."""
        if self.size == 1:
            return dict(values)
        packed = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        packed = packed.to(self.device, torch.float32 if self.device.type == "npu" else None)
        dist.all_reduce(packed)
        return dict(zip(values, (packed / self.size).tolist()))

    def gather(self, tensor):
        """Concatenate a CPU tensor of every rank, in rank order; same shape on all ranks."""
        if self.size == 1:
            return tensor
        here = tensor.to(self.device).contiguous()
        parts = [torch.empty_like(here) for _ in range(self.size)]
        dist.all_gather(parts, here)
        return torch.cat(parts).cpu()

    def gather_objects(self, value):
        """Return the list of every rank's `value`, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def any(self, flag):
        """Tell whether `flag` holds on any rank; all ranks get the same answer."""
        return self.mean({"flag": bool(flag)})["flag"] > 0

    def barrier(self):
        """Wait for every rank."""
        if self.size > 1:
            dist.barrier()

    def main_first(self, work):
        """Call `work` on the main rank, then on the others, which find what it has left on disk."""
        result = work() if self.is_main else None
        self.barrier()
        return result if self.is_main else work()


def start(device="auto"):
    """Join the process group if a launcher started several processes; return the `World`.

    torchrun's RANK, WORLD_SIZE and LOCAL_RANK decide. device: "auto", "cuda", "npu" or "cpu".
    """
    kind = accelerator() if device == "auto" else device
    module = device_module(kind)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    if module:
        module.set_device(local)
    else:
        keep_freed_memory()
    if not module and ("OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ):
        # torchrun sets one thread for each process; on a CPU that would leave cores idle
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
            else os.cpu_count()                # macOS has no affinity
        torch.set_num_threads(max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
    if size > 1 and not dist.is_initialized():
        dist.init_process_group(BACKENDS[kind])
    return World(rank, size, torch.device(kind, local) if module else torch.device("cpu"))


def keep_freed_memory():
    """Tell glibc to keep freed blocks instead of handing them back to the kernel.

    A CPU step frees and asks for the same hundreds of MB each time; paging them in anew costs a
    quarter of the step (measured: 0.65 s -> 0.49 s). Does nothing where there is no glibc.
    """
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    for parameter, value in ((-3, 2 ** 31 - 1), (-1, 2 ** 31 - 1), (-2, 2 ** 26)):
        mallopt(parameter, value)          # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD


def stop():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def seed_everything(seed):
    """Seed Python, numpy and torch on every device."""
    random.seed(seed)
    np.random.seed(seed % 2 ** 32)
    torch.manual_seed(seed)


def rng_state(world):
    """Return the state of every random number generator, as tensors and plain values."""
    module = device_module(world.device.type)
    kind, keys, *rest = np.random.get_state()
    return {"torch": torch.get_rng_state(), "python": random.getstate(),
            "numpy": (kind, torch.from_numpy(keys.astype(np.int64)), *rest),
            "device": module.get_rng_state() if module else None}


def set_rng_state(world, state):
    """Restore what `rng_state` returned."""
    module = device_module(world.device.type)
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if module and state["device"] is not None:
        module.set_rng_state(state["device"])


def parallelize(model, world):
    """Wrap the model for data parallelism; one process needs no wrapper.

    broadcast_buffers is off: there are no buffers, and their broadcast would make an evaluation on
    rank 0 alone hang.
    """
    if world.size == 1:
        return model
    ids = [world.device.index] if world.device.type != "cpu" else None
    return DistributedDataParallel(model, device_ids=ids, broadcast_buffers=False,
                                   gradient_as_bucket_view=True)
