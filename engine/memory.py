"""Memory on a CPU: keep freed blocks, hand them back before they are too many, bound two caches.

A CPU step frees and asks for the same hundreds of MB each time. Paging them in anew costs a quarter
of a small model's step and more than half of a wide one's (docs/log.md). Where the C library is not
glibc, the caches alone are bounded.
"""
import contextlib
import ctypes
import functools
import os
import sys
from pathlib import Path


def keep_freed_memory():
    """Tell glibc to keep freed blocks instead of handing them back to the kernel.

    -1 and 0 are glibc's ways to say never. A number of bytes would have to fit an int, and a step
    frees more.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")     # torch asks for pages of 2 MB, not 4 kB
    if library := _glibc():
        library.mallopt(-4, 0)                             # M_MMAP_MAX
        library.mallopt(-1, -1)                            # M_TRIM_THRESHOLD
        library.mallopt(-2, 2 ** 26)                       # M_TOP_PAD


def bound_kernel_caches(shapes=128):
    """Keep the kernels of the last `shapes` shapes only; call before the first matrix product.

    oneDNN builds a kernel for each shape of a product, and every batch has a new number of tokens.
    oneDNN and torch keep 1,024 of them each by default: half a GB, in holes of two more.
    """
    for cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(cache, str(shapes))


def release_memory(share=0.5):
    """Hand the pages of freed blocks back to the kernel, once this machine's ranks hold `share`.

    Blocks that change their size with every batch leave holes. Kept for ever they grow to ten times
    what is in use, and the kernel kills the run (docs/log.md). Handed back at every step they would
    have to be paged in anew.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if _glibc() and ranks * held("RssAnon") * 1e9 > share * available():
        _glibc().malloc_trim(0)


@functools.cache
def available():
    """Return the bytes of memory that this machine has, or this container may use."""
    physical, limit = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), ""
    with contextlib.suppress(OSError):
        limit = Path("/sys/fs/cgroup/memory.max").read_text("ascii").strip()
    return min(physical, int(limit)) if limit.isdigit() else physical


def held(field="VmHWM"):
    """Return a line of /proc/self/status in GB, by default the most memory ever; 0 if not Linux."""
    if not sys.platform.startswith("linux"):
        return 0.0
    with open("/proc/self/status", encoding="ascii", errors="replace") as file:
        return sum(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith(field))


def _glibc():
    """Return the C library, or None where it is not glibc."""
    try:
        library = ctypes.CDLL("libc.so.6")
        return library if hasattr(library, "malloc_trim") else None
    except OSError:
        return None
