"""The memory of a process as its kernel counts it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import psutil

from ullage.errors import InputError

_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes in physical memory. `high_water_bytes` is the largest `rss_bytes` since the start or
    the last `reset_high_water`; `anon_bytes` is the process's own, `file_bytes` is mapped from
    files, which the kernel can drop and read again. Both are None where the kernel does not say."""

    rss_bytes: int
    high_water_bytes: int
    anon_bytes: int | None
    file_bytes: int | None


def status_bytes(pid: int | str = "self") -> ProcessMemory:
    """The memory of process `pid`. Off Linux, the high-water mark of another process is not known:
    it is what that process holds now.

    Raises:
        InputError: no such process, or not one that may be looked at.
    """
    try:
        text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _portable(pid)
    held = {
        name: int(value.split()[0]) * 1024
        for name, _, value in (line.partition(":") for line in text.splitlines())
        if name in {"VmRSS", "VmHWM", "RssAnon", "RssFile"}
    }
    rss_bytes = held.get("VmRSS", 0)  # a process that has ended but is not yet waited for has none
    high_water_bytes = held.get("VmHWM", rss_bytes)
    return ProcessMemory(rss_bytes, high_water_bytes, held.get("RssAnon"), held.get("RssFile"))


def reset_high_water() -> bool:
    """Let this process's high-water mark start again from what it holds now; False where the kernel
    does not allow it."""
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _portable(pid: int | str) -> ProcessMemory:
    try:
        process = psutil.Process(None if pid == "self" else int(pid))
        rss_bytes = int(process.memory_info().rss)
    except (psutil.Error, ValueError) as error:
        raise InputError(f"There is no process {pid} to look at.") from error
    high_water_bytes = _own_high_water() if process.pid == psutil.Process().pid else 0
    return ProcessMemory(rss_bytes, max(rss_bytes, high_water_bytes), None, None)


def _own_high_water() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return 0
    unit_bytes = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit_bytes


def obtainable_bytes() -> int:
    """What this process can hold without pushing others out: what is available now, and what it
    holds itself."""
    return int(psutil.virtual_memory().available) + status_bytes().rss_bytes
