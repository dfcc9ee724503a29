"""Calls of torch that are too small to be shared out among threads, side by side.

OpenMP, by which torch goes parallel, shares out the heads of one call. Heads with different numbers
of entries are a call each; a call releases Python's lock, so that threads of ours can make several
at once. Each of ours has OpenMP to itself alone.
"""

import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache as cached
from threading import Barrier

import torch

from ullage.specs.tiles import THREADS

SOON_TURNS = 10_000  # of waiting: under a tenth of a millisecond


def count(calls: int) -> int:
    """Threads that so many calls are worth. One where OpenMP's, once they have nothing to do, keep
    the cores for milliseconds, as they do unless the environment told them otherwise."""
    if sys.platform != "linux" or not _cores_are_free():
        return 1
    return min(torch.get_num_threads(), THREADS, calls)


def _cores_are_free() -> bool:
    """Whether GNU OpenMP was told to let waiting threads sleep soon (see runtime/threads.py)."""
    with suppress(ValueError):
        return int(os.environ.get("GOMP_SPINCOUNT", "")) <= SOON_TURNS
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE"


def side_by_side(
    call: Callable[[int], torch.Tensor], sizes: Sequence[int], threads: int
) -> list[torch.Tensor]:
    """`call` of each index of `sizes`, which say how long each takes, on so many threads, without
    gradients. What one raises is raised."""

    def several(share: list[int]) -> list[torch.Tensor]:
        with torch.inference_mode():
            return [call(index) for index in share]

    shares = shared_out(sizes, threads)
    made = dict[int, torch.Tensor]()
    for share, outputs in zip(shares, _workers(threads).map(several, shares), strict=True):
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


@cached
def _workers(threads: int) -> ThreadPoolExecutor:
    """Started at once, as a thread that tells torch how many threads it has tells threads to come
    too."""
    ready, before = Barrier(threads), torch.get_num_threads()

    def alone() -> None:
        torch.get_num_threads()  # the first call would undo what is set before it
        torch.set_num_threads(1)
        ready.wait()

    workers = ThreadPoolExecutor(threads, "ullage-attention", initializer=alone)
    list(workers.map(int, range(threads)))
    torch.set_num_threads(before)
    return workers


if hasattr(os, "register_at_fork"):  # not on Windows, where nothing forks
    os.register_at_fork(after_in_child=_workers.cache_clear)  # threads do not come along
