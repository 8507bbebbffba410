"""Memory on a CPU: a step keeps the blocks of the last one, and gives back what is too much."""
import os
import resource

import numpy as np
import pytest
import torch

from engine import memory

pytestmark = pytest.mark.skipif(memory._glibc() is None, reason="not glibc")


def test_a_block_of_the_last_step_is_not_paged_in_anew():
    """Page faults of asking for 40 MB again: 10,000 of 4 kB each time, were it handed back."""
    reader, writer = os.pipe()
    if os.fork() == 0:                             # whose memory nobody has touched
        memory.keep_freed_memory()
        faults = []
        for _ in range(40):                        # the first ones fill holes of the parent's
            torch.ones(10_000_000)
            faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
        os.write(writer, str(faults[-1] - faults[-10]).encode())
        os._exit(0)
    os.wait()
    assert int(os.read(reader, 20)) < 1000


def test_freed_memory_goes_back_once_the_process_is_large():
    """Blocks of changing size leave holes that glibc keeps: a long run was killed for them."""
    memory.keep_freed_memory()
    try:
        blocks = [np.ones(20_000 + 7 * i) for i in range(1500)]          # 240 MB and more
        guard = blocks[-1]
        held = memory._resident_pages()
        del blocks
        memory.release_memory(share=0.999)
        assert memory._resident_pages() > 0.7 * held        # far below its share: kept
        memory.release_memory(share=0)
        assert memory._resident_pages() < held - 30_000 and guard[0] == 1
    finally:
        for parameter, value in ((-4, 65536), (-1, 2 ** 17), (-2, 2 ** 17)):
            memory._glibc().mallopt(parameter, value)          # glibc's defaults
