"""Memory on a CPU: a step keeps the blocks of the last one, and gives back what is too much."""
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from engine import memory
from ranks import ROOT

pytestmark = pytest.mark.skipif(memory._glibc() is None, reason="not glibc")


def test_a_block_of_the_last_step_is_not_paged_in_anew():
    """Page faults of asking for 200 MB again: 51,200 of 4 kB each time, were it handed back."""
    script = """
import resource
import numpy as np
from engine import memory
memory.keep_freed_memory()
faults = []
for _ in range(4):
    np.ones(25_000_000)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[-1] - faults[0])"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and int(done.stdout) < 1000, done.stdout + done.stderr


def test_a_containers_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "memory.max")
    physical = memory.available.__wrapped__()              # no such file; past the cache
    for text, expected in (("max\n", physical), ("4096\n", 4096), (f"{2 ** 62}\n", physical)):
        (tmp_path / "memory.max").write_text(text)
        assert memory.available.__wrapped__() == expected > 0


def test_kernels_of_old_shapes_are_dropped():
    """A matrix product of a new shape builds a kernel; the caches of 600 keep 60 MB and more."""
    script = """
import ctypes
import sys
import torch
from engine import memory
torch.set_num_threads(1)
if sys.argv[1] == "bound":
    memory.bound_kernel_caches(16)
class Info(ctypes.Structure):
    _fields_ = [(str(i), ctypes.c_size_t) for i in range(10)]
library = memory._glibc()
library.mallinfo2.restype = Info
weight, used = torch.ones(768, 256, dtype=torch.bfloat16), []
with torch.no_grad():
    for tokens in range(100, 800):
        weight @ torch.ones(256, tokens, dtype=torch.bfloat16)
        if tokens in (200, 799):
            used.append(getattr(library.mallinfo2(), "7"))
print((used[1] - used[0]) // 2 ** 20)"""
    env = {key: value for key, value in os.environ.items() if "CACHE_CAPACITY" not in key}
    both = [subprocess.Popen([sys.executable, "-c", script, how], cwd=ROOT, text=True, env=env,
                             stdout=subprocess.PIPE) for how in ("free", "bound")]
    grown = [int(process.communicate()[0]) for process in both]
    assert grown[1] < 20, grown
    if grown[0] < 60:
        pytest.skip(f"this processor's kernels keep {grown[0]} MB")


def test_freed_memory_goes_back_once_the_process_is_large():
    """Blocks of changing size leave holes that glibc keeps: a long run was killed for them."""
    memory.keep_freed_memory()
    try:
        blocks = [np.ones(20_000 + 7 * i) for i in range(1500)]          # 240 MB and more
        guard = blocks[-1]
        held = memory.held("VmRSS")
        del blocks
        memory.release_memory(share=0.999)
        assert memory.held("VmRSS") > 0.7 * held        # far below its share: kept
        memory.release_memory(share=0)
        assert memory.held("VmRSS") < held - 0.12 and guard[0] == 1
    finally:
        for parameter, value in ((-4, 65536), (-1, 2 ** 17), (-2, 2 ** 17)):
            memory._glibc().mallopt(parameter, value)          # glibc's defaults


@pytest.mark.parametrize("ranks, released", [(1, False), (4, True)])
def test_the_ranks_of_a_machine_count_together(monkeypatch, ranks, released):
    calls = []
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    monkeypatch.setattr(memory, "held", lambda field: 1.0)         # GB of this rank, of 6 in all
    monkeypatch.setattr(memory, "available", lambda: 6e9)
    monkeypatch.setattr(memory, "_glibc", lambda: SimpleNamespace(malloc_trim=calls.append))
    memory.release_memory()
    assert calls == [0] * released
