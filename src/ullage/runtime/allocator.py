"""Keep what allocators hold near what lives.

By default glibc raises its mmap threshold to 32 MiB as it sees large blocks freed, and from then on
activations leave holes in the heap: resident memory stands above live memory by an amount that
hangs on history, which nobody can plan. And by default CUDA's caching allocator keeps freed blocks
in the sizes that they had, which tensors of other sizes cannot use.
"""

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_THRESHOLD_BYTES = 256 << 10  # a page fault costs little beside work on that many bytes


def return_freed_memory() -> bool:
    """Fix the thresholds for this process; False where the allocator is not glibc's."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:
        return False
    fixed = mallopt(_M_MMAP_THRESHOLD, _THRESHOLD_BYTES)
    return bool(fixed and mallopt(_M_TRIM_THRESHOLD, _THRESHOLD_BYTES))


def expand_segments() -> None:
    """Let CUDA's caching allocator grow and reuse one segment for tensors of all sizes, unless the
    environment says how it is to work. Before torch is imported, which reads it then; of no effect
    where there is no CUDA, or not Linux."""
    if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ and sys.platform.startswith("linux"):
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
