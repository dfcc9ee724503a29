"""Make glibc's allocator return large tensors to the system when they are freed.

By default glibc raises its mmap threshold to 32 MiB as it sees large blocks freed, and from then on
activations leave holes in the heap: resident memory stands above live memory by an amount that
hangs on history, which nobody can plan.
"""

import ctypes
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
