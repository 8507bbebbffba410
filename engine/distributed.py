"""Devices, ranks and data parallelism, applied from outside: the model knows nothing of them.

PAPER App. A trains on Ascend 910B with mixed precision. Here a device is a name (cuda, npu, cpu)
and a backend follows from it (nccl, hccl, gloo); there is no fork of the code anywhere else. `npu`
comes with torch_npu, which registers `torch.npu` when it is imported.
"""
import contextlib
import gc
import os
import shutil
import traceback
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from engine import kernels, memory

PEAK_FLOPS = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12,
              "A100": 312e12, "910B": 376e12}      # dense bfloat16; the first name that fits
BACKENDS = {"cuda": "cpu:gloo,cuda:nccl", "npu": "cpu:gloo,npu:hccl", "cpu": "gloo"}
# One rank may train a tokenizer or unpack a file while the others wait for its word, over gloo.
# To meet, and for a card's collectives, torch's 30 minutes are right: nobody tells a node that
# another one has died.
PATIENCE = timedelta(hours=12)


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
    if kind == "npu":
        accelerator()                          # imports torch_npu, if there is one
    module = getattr(torch, kind, None)
    if kind != "cpu" and (module is None or not module.is_available()):
        raise ValueError(f"device {kind!r} is not available on this machine")
    return module if kind != "cpu" else None


def peak_flops(device):
    """Return the nominal bfloat16 FLOP/s of an accelerator, None for CPUs and unknown chips."""
    if device.type == "cpu":
        return None
    name = device_module(device.type).get_device_name(device.index or 0)
    return next((peak for chip, peak in PEAK_FLOPS.items() if chip in name), None)


def choose_dtype(name, device):
    """Return "float32" or "bfloat16"; "auto" is bfloat16 where its matmuls are in hardware."""
    if name != "auto":
        return name
    if device.type == "cpu":
        flags = torch.cpu.get_capabilities()
        is_fast = any(flags.get(unit) for unit in ("avx512_bf16", "amx_bf16", "bf16"))
    else:
        is_fast = device.type != "cuda" or \
            torch.cuda.is_bf16_supported(including_emulation=False)
    return "bfloat16" if is_fast else "float32"


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
        """Return the autocast context of "bfloat16"; that of "float32" does nothing."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=dtype == "bfloat16")

    def mean(self, values):
        """Return {name: mean over ranks} of a dict of numbers with the same keys on every rank."""
        if self.size == 1:
            return dict(values)
        packed = torch.tensor([float(v) for v in values.values()], dtype=torch.float64)
        packed = packed.to(self.device, torch.float32 if self.device.type == "npu" else None)
        dist.all_reduce(packed)
        return dict(zip(values, (packed / self.size).tolist()))

    def gather_objects(self, value):
        """Return the list of every rank's `value`, in rank order."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def gather_to_main(self, value):
        """Return the list of every rank's `value` on the main rank, None on the others."""
        values = [None] * self.size if self.is_main else None
        dist.gather_object(value, values)
        return values

    def from_main(self, value):
        """Return the main rank's `value` on every rank."""
        values = [value]
        dist.broadcast_object_list(values, src=0)
        return values[0]

    def on_main(self, work):
        """Call `work` on the main rank alone; return its result, or raise its error, on all."""
        return together(self, work if self.is_main else lambda: None)[0]


ALONE = World(0, 1, torch.device("cpu"))


def together(world, work):
    """Return the list of every rank's `work()`; all ranks must call, and wait for each other.

    An error of one rank is raised on all of them, so that none waits for ever.
    """
    try:
        value = work()
    except Exception as error:
        if world.size > 1:
            error.add_note(traceback.format_exc())     # which pickling would lose
        value = error
    values = world.gather_objects(value)
    for value in values:
        if isinstance(value, Exception):
            raise value
    return values


def start(device="auto"):
    """Join the process group if a launcher started several processes; return the `World`.

    torchrun's RANK, WORLD_SIZE and LOCAL_RANK decide. device: "auto", "cuda", "npu" or "cpu".
    """
    kind = accelerator() if device == "auto" else device
    module = device_module(kind)
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local = int(os.environ.get("LOCAL_RANK", 0))
    with contextlib.suppress(ImportError, ValueError, OSError):     # each data file stays open
        import resource
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    if module:
        module.set_device(local)
    else:
        memory.keep_freed_memory()
        memory.bound_kernel_caches()
    # for several processes torchrun sets one thread each, which would leave cores idle
    neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ and neighbours > 1
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is None or threads == "1" and by_torchrun:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") \
            else os.cpu_count()                # macOS has no affinity
        torch.set_num_threads(max(1, cores // neighbours))
    if size > 1 and not dist.is_initialized():
        from torch.distributed.nn import functional  # noqa: F401  before the group: see `stop`
        dist.init_process_group(BACKENDS[kind], **_fresh_store(rank, size))
        dist.group.WORLD._get_backend(torch.device("cpu"))._set_default_timeout(PATIENCE)
    return World(rank, size, torch.device(kind, local) if module else torch.device("cpu"))


def _fresh_store(rank, size):
    """Return what a process that torchrun has restarted needs to meet the others.

    torchrun keeps its store, in which the addresses of the dead processes are found: without a
    prefix the new ones wait for them (torch 2.13, `--max-restarts`).
    """
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    if attempt == "0":
        return {}
    store, rank, size = next(dist.rendezvous("env://", rank, size))
    return {"store": dist.PrefixStore(f"attempt_{attempt}", store), "rank": rank,
            "world_size": size}


def stop(is_orderly=True):
    """Leave the process group, and end its threads: one that is left may abort the process.

    A card's group waits for the others here. After an error they may wait elsewhere: then this
    process only ends, and torchrun stops the others. Threads end with the last reference to the
    group. A DDP model holds one, in a cycle: nobody may hold the model any more. Default arguments
    in torch.distributed.nn.functional hold the group of its import: `start` imports it before.
    """
    if dist.is_initialized() and (is_orderly or dist.get_backend() == "gloo"):
        gc.collect()
        dist.destroy_process_group()


# ---------------------------------------------------------------- many devices

def parallelize(model, world, mode="ddp", dtype="float32"):
    """Return the model as `world` trains it; one process needs nothing, whatever the mode.

    ddp: every rank holds all weights, gradients and optimizer state. zero1: the same model, but see
    `shard_optimizer`. fsdp: `fully_shard` of each block, then of the root (embedding and last
    norm), in place. Its blocks compute in `dtype` and reduce in float32. The root and the residual
    stream stay in float32, as under autocast. A model on the meta device takes no memory until
    `fill`.
    """
    if world.size == 1:
        return model
    if mode != "fsdp":
        ids = [world.device.index] if world.device.type != "cpu" else None
        return DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    from torch.distributed.device_mesh import init_device_mesh      # half a second of imports
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    mesh = init_device_mesh(world.device.type, (world.size,))
    blocks = MixedPrecisionPolicy(torch.bfloat16 if dtype == "bfloat16" else None, torch.float32,
                                  cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=blocks)
    return fully_shard(model, mesh=mesh)


def fill(model, world, weights):
    """Give an fsdp model on the meta device its shards of `weights`, the main rank's state dict."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    model.to_empty(device=world.device)
    set_model_state_dict(model, weights if world.is_main else {}, options=StateDictOptions(
        full_state_dict=True, broadcast_from_rank0=True))


def zero_grad(model, forms_buckets):
    """Clear the gradients of a model as its ranks train it.

    DDP's are views of its buckets: if they went, both would be held, so they are set to zero. But
    before its second step DDP forms new buckets (forms_buckets). Then the views of the old ones go.
    """
    model.zero_grad(set_to_none=forms_buckets or not hasattr(model, "no_sync"))


@torch.no_grad()
def whole_model(model, world):
    """Return a whole copy of an fsdp model, and any other model itself; all ranks must call."""
    if not hasattr(next(model.parameters()), "full_tensor"):
        return model
    with torch.device("meta"):                     # FSDP2's class gives its plain one when called
        copy = type(model)(model.config, kernels.pick(world.device))
    copy.to_empty(device=world.device)
    for mine, p in zip(copy.parameters(), model.parameters()):
        mine.copy_(whole(p))                       # one tensor at a time
    return copy


def compilers():
    """Return the paths of this machine's C++ compilers that torch.compile would take."""
    names = os.environ.get("CXX", "").split()[:1] or ["g++", "clang++", "cl"]
    return list(filter(None, map(shutil.which, names)))


def compile_blocks(model, backend="inductor"):
    """Compile the blocks of a model in place, for any number of tokens; weights keep their names.

    All blocks share one piece of machine code. The kernels keep attention out of it, since its
    shapes change with every batch. A block is small enough for DDP: it is not cut further.
    Raises ValueError where there is no C++ compiler.
    """
    if backend == "inductor" and not compilers():
        raise ValueError("compile=True: torch.compile needs a C++ compiler: g++, clang++, cl, or "
                         f"the one that CXX names (now {os.environ.get('CXX')!r})")
    torch._dynamo.config.optimize_ddp = False
    for block in model.layers:
        block.forward = torch.compile(block.forward, dynamic=True, backend=backend)


def shard_optimizer(optimizer, world, mode="ddp"):
    """Return the optimizer of a mode, made from a fresh one over the parallelized model.

    zero1 (PAPER App. A, ZeRO stage 1): each rank keeps optimizer state for its rows of every
    parameter, updates these, and fetches the others'. The rows are views of the parameter, as
    DTensors, which fsdp's parameters are already. An elementwise update is the same, but for the
    rounding of a fused kernel at a tensor's end.
    """
    if mode != "zero1" or world.size == 1:
        return optimizer
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard
    mesh = init_device_mesh(world.device.type, (world.size,))

    def shard(tensor):
        width = -(-len(tensor) // world.size)
        rows = tensor.detach()[world.rank * width:][:width]
        return DTensor.from_local(rows, mesh, [Shard(0)], run_check=False, shape=tensor.shape,
                                  stride=tensor.stride())

    # the new name is of torch 2.13
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    shards = {p: shard(p) for group in optimizer.param_groups for p in group["params"]}
    for group in optimizer.param_groups:
        group["params"] = [shards[p] for p in group["params"]]

    def share_gradients(*_):
        for p, own in shards.items():
            own.grad = None if p.grad is None else shard(p.grad)

    @torch.no_grad()
    def fetch_rows(*_):
        for p, own in shards.items():
            own.grad = None
            if len(p) % world.size:
                p.copy_(own.full_tensor())             # rows of unequal number
            else:
                gather(p.detach(), own.to_local())

    optimizer.register_step_pre_hook(share_gradients)
    optimizer.register_step_post_hook(fetch_rows)
    return optimizer


# ---------------------------------------------------------------- one layout of saved state

def whole(tensor):
    """Return a tensor of which this rank may hold a shard only; then all ranks must call."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_state(values, world):
    """Return {name: whole tensor} of a state dict on the main rank, {} on others; all must call.

    A checkpoint looks the same in every mode: another mode or number of ranks can resume it.
    """
    state = {}
    for name, value in values.items():
        value = whole(value)                       # one tensor at a time: never the whole model
        if world.is_main:
            state[name] = value.cpu()
    return state


def optimizer_state(optimizer, world):
    """Return the state dict of the whole optimizer on the main rank; all ranks must call."""
    state = optimizer.state_dict()
    return state | {"state": {i: gather_state(state["state"][i], world)
                              for i in sorted(state["state"])}}


def load_optimizer_state(optimizer, state):
    """Take over what `optimizer_state` gave, in any mode and on any number of ranks.

    Values are copied: those of a checkpoint are mapped.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]

    def own(value, p):
        if not value.dim() or not hasattr(p, "full_tensor"):
            return value.to(p.device if value.dim() else "cpu", copy=True)
        from torch.distributed.tensor import distribute_tensor
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements,
                                 src_data_rank=None).clone()   # every rank has read the file

    optimizer.load_state_dict(state | {"state": {
        i: {key: own(value, params[i]) for key, value in entry.items()}
        for i, entry in state["state"].items()}})
