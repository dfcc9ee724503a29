"""Calls side by side: shared out evenly, each alone; none where waiting threads keep the cores."""

import multiprocessing
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ullage.kv.kernels import threads
from ullage.specs.tiles import THREADS


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=40), st.integers(1, 8))
def test_every_index_is_in_one_share_and_none_is_far_above_another(
    sizes: list[int], shares: int
) -> None:
    given_out = threads.shared_out(sizes, shares)
    assert sorted(index for share in given_out for index in share) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in share) for share in given_out]
    assert max(totals) - min(totals) <= max(sizes)


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three threads of torch's, and none of ours yet."""
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    monkeypatch.setattr(threads, "_workers", threads._Workers())
    yield
    torch.set_num_threads(before)


def test_outputs_come_in_order_and_torch_is_alone_in_each_thread() -> None:
    """And has as many threads as before everywhere else, in threads to come too."""
    seen = []

    def call(index: int) -> torch.Tensor:
        seen.append((threading.get_ident(), torch.get_num_threads()))
        return torch.tensor(index)

    found = threads.on_threads(call, [3, 1, 2, 9, 4], 3)
    assert torch.stack(found).tolist() == [0, 1, 2, 3, 4]
    assert {count for _, count in seen} == {1}
    assert threading.get_ident() not in {thread for thread, _ in seen}
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), later) == (3, [3])


def test_what_one_raises_is_raised() -> None:
    def call(index: int) -> torch.Tensor:
        raise MemoryError(index)

    with pytest.raises(MemoryError):
        threads.on_threads(call, [1, 1], 2)
    assert len(threads.on_threads(torch.tensor, [1, 1], 2)) == 2


def test_threads_that_cannot_all_start_are_an_error_and_nothing_waits_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    start, started = threading.Thread.start, []

    def fail(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        start(thread)

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", fail)
        with pytest.raises(RuntimeError, match="new thread"):
            threads.on_threads(torch.tensor, [1, 1], 2)
    started[0].join(10)
    assert not started[0].is_alive()
    assert torch.get_num_threads() == 3
    assert len(threads.on_threads(torch.tensor, [1, 1], 2)) == 2


def test_two_that_come_first_share_the_threads() -> None:
    found: list[int] = []

    def ask() -> None:
        found.append(id(threads._workers.get()))

    asking = [threading.Thread(target=ask) for _ in range(4)]
    for thread in asking:
        thread.start()
    for thread in asking:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == 1
    assert torch.get_num_threads() == 3


def test_a_forked_process_has_threads_of_its_own() -> None:
    threads.on_threads(torch.tensor, [1, 1], 2)
    child = multiprocessing.get_context("fork").Process(
        target=threads.on_threads, args=(torch.tensor, [1, 1], 2)
    )
    child.start()
    child.join(30)
    alive = child.is_alive()
    child.kill()
    assert not alive
    assert child.exitcode == 0


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, 1),
        ({"GOMP_SPINCOUNT": "1000"}, 3),
        ({"GOMP_SPINCOUNT": "300000"}, 1),
        ({"GOMP_SPINCOUNT": "infinite"}, 1),
        ({"OMP_WAIT_POLICY": "passive"}, 3),
        ({"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "infinite"}, 1),
    ],
)
def test_threads_of_ours_are_for_where_waiting_ones_sleep_soon(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], expected: int
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert threads.count(3) == expected
    assert threads.count(40) == (THREADS if expected > 1 else 1)
