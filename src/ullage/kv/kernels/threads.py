"""Calls of torch that are too small to be shared out among threads, side by side.

OpenMP, by which torch goes parallel, shares out the heads of one call. Heads with different numbers
of entries are a call each; a call releases Python's lock, so that threads of ours can make several
at once. Each of ours has OpenMP to itself alone.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Lock

import torch

from ullage.specs.tiles import THREADS

SOON_TURNS = 10_000  # of waiting: a fraction of a millisecond


def count(calls: int) -> int:
    """Threads that so many calls are worth. One where OpenMP's, once they have nothing to do, keep
    the cores for milliseconds, as they do unless the environment told them otherwise."""
    if sys.platform != "linux" or not _cores_are_free():
        return 1
    return min(torch.get_num_threads(), THREADS, calls)


def _cores_are_free() -> bool:
    """Whether GNU OpenMP was told to let waiting threads sleep soon (see runtime/threads.py): it
    reads this when torch is imported."""
    turns = os.environ.get("GOMP_SPINCOUNT")
    if turns is None:
        return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"
    return turns.isdecimal() and int(turns) <= SOON_TURNS


def on_threads(
    call: Callable[[int], torch.Tensor], sizes: Sequence[int], threads: int
) -> list[torch.Tensor]:
    """`call` of each index of `sizes`, which say how long each takes, on so many threads, without
    gradients. What one raises is raised."""

    def several(share: list[int]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [call(index) for index in share]

    shares = shared_out(sizes, threads)
    made = dict[int, torch.Tensor]()
    for share, outputs in zip(shares, _workers.get().map(several, shares), strict=True):
        made.update(zip(share, outputs, strict=True))
    return [made[index] for index in range(len(sizes))]


def shared_out(sizes: Sequence[int], shares: int) -> list[list[int]]:
    """The indices of `sizes` in so many shares of about the same size: the largest first, each to
    the share that has least."""
    total, given = [0] * shares, [list[int]() for _ in range(shares)]
    for index in sorted(range(len(sizes)), key=sizes.__getitem__, reverse=True):
        least = total.index(min(total))
        total[least] += sizes[index]
        given[least].append(index)
    return given


class _Workers:
    """Threads that are started at once, when they are first wanted."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._started: ThreadPoolExecutor | None = None

    def get(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._started is None:
                self._started = _start(min(torch.get_num_threads(), THREADS))
            return self._started


def _start(threads: int) -> ThreadPoolExecutor:
    """All of `threads`. What a thread tells torch of how many it has, torch tells threads to come;
    so they come together, and then it is told what it was before."""
    ready, before = Barrier(threads), torch.get_num_threads()

    def alone() -> None:
        torch.get_num_threads()  # the first call would undo what is set before it
        torch.set_num_threads(1)
        ready.wait()

    workers = ThreadPoolExecutor(threads, "ullage-attention", initializer=alone)
    try:
        list(workers.map(int, range(threads)))
    except BaseException:
        ready.abort()  # whoever waits for one that never came
        workers.shutdown(wait=False)
        raise
    finally:
        torch.set_num_threads(before)
    return workers


_workers = _Workers()


def _forget() -> None:
    """In a forked process: threads do not come along, and the lock may have been held."""
    global _workers
    _workers = _Workers()


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_forget)
