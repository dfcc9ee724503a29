"""The pool hands every block out once, takes every block back, and forgets none."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
)

from ullage.errors import BudgetExceeded
from ullage.kv.entries import bits, stored
from ullage.kv.pool import HeapBlocks, KVPool, Place, Run


def blocks_of(runs: list[Run]) -> list[int]:
    return [block for run in runs for block in range(run.start, run.start + run.count)]


def pool_of(num_blocks: int) -> KVPool:
    return KVPool(num_blocks, head_dim=2, dtype=torch.bfloat16)


class PoolMachine(RuleBasedStateMachine):
    """Any order of takes and returns, in groups of `group` blocks, as the KV heads of a row are."""

    held = Bundle("held")

    @initialize(group=st.integers(1, 4), groups=st.integers(1, 12))
    def make(self, group: int, groups: int) -> None:
        self.group = group
        self.pool = pool_of(group * groups)
        self.taken: set[int] = set()

    @rule(target=held, groups=st.integers(1, 8))
    def take(self, groups: int) -> Any:
        count, free = groups * self.group, self.pool.free_blocks
        longest = max((run.count for run in self.pool._free), default=0)
        if count > free:
            with pytest.raises(BudgetExceeded):
                self.pool.take(count, self.group)
            assert self.pool.free_blocks == free
            return multiple()
        runs = self.pool.take(count, self.group)
        blocks = blocks_of(runs)
        assert len(blocks) == len(set(blocks)) == count
        assert not self.taken & set(blocks)
        assert set(blocks) <= set(range(self.pool.num_blocks))
        assert all(run.count % self.group == 0 for run in runs)
        assert len(runs) == 1 or longest < count
        self.taken |= set(blocks)
        return runs

    @rule(runs=consumes(held))
    def give_back(self, runs: list[Run]) -> None:
        self.pool.give_back(runs)
        self.taken -= set(blocks_of(runs))

    @invariant()
    def free_is_exactly_what_nobody_holds(self) -> None:
        if not hasattr(self, "pool"):
            return
        self.pool.check_integrity()
        free = blocks_of(self.pool._free)
        assert set(free) == set(range(self.pool.num_blocks)) - self.taken
        assert len(free) == self.pool.free_blocks
        ends = {run.start + run.count for run in self.pool._free}
        assert not ends & {run.start for run in self.pool._free}, "neighbours are not joined"


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestPool = PoolMachine.TestCase


@given(order=st.permutations(range(6)))
def test_all_blocks_come_back_as_one_run_in_any_order(order: list[int]) -> None:
    pool = pool_of(12)
    held = [pool.take(2) for _ in range(6)]
    for index in order:
        pool.give_back(held[index])
    assert pool.take(12) == [Run(0, 12)]


def fragmented() -> KVPool:
    """16 blocks, of which 4..5, 8..11 and 14..15 are free."""
    pool = pool_of(16)
    runs = {start: pool.take(count) for start, count in ((0, 4), (4, 2), (6, 2), (8, 4), (12, 2))}
    pool.give_back(runs[4] + runs[8])
    return pool


def test_the_smallest_run_that_holds_all_is_taken() -> None:
    assert blocks_of(fragmented().take(2)) in ([4, 5], [14, 15])
    assert fragmented().take(3) == [Run(8, 3)]


def test_several_runs_are_taken_when_no_single_one_holds_all() -> None:
    pool = fragmented()
    assert sorted(blocks_of(pool.take(6, multiple=2))) == [4, 5, 8, 9, 10, 11]
    assert pool.free_blocks == 2


def test_too_few_whole_groups_take_nothing() -> None:
    pool = fragmented()  # 8 free, but only one group of three fits
    with pytest.raises(BudgetExceeded, match="8 of 16"):
        pool.take(6, multiple=3)
    assert pool.free_blocks == 8
    pool.check_integrity()


@pytest.mark.parametrize("free", [[Run(0, 2), Run(1, 3)], [Run(4, 2), Run(0, 2)], [Run(7, 2)]])
def test_integrity_check_sees_damage(free: list[Run]) -> None:
    pool = pool_of(8)
    pool._free = free
    with pytest.raises(RuntimeError, match="damaged"):
        pool.check_integrity()


@pytest.mark.parametrize("again", [Run(0, 3), Run(2, 2), Run(1, 1), Run(3, 5), Run(7, 1)])
def test_a_block_given_back_twice_is_refused(again: Run) -> None:
    pool = pool_of(8)
    held = pool.take(6)
    pool.take(1)
    pool.give_back([Run(0, 3)])
    with pytest.raises(RuntimeError, match="twice"):
        pool.give_back([again])
    pool.give_back([Run(3, 3)])
    pool.check_integrity()
    assert held == [Run(0, 6)]
    assert pool.free_blocks == 7


@pytest.mark.parametrize(
    ("dtype", "vector_bytes"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.int8, 8 + 2)]
)
def test_nbytes_is_what_the_tensors_hold(dtype: torch.dtype, vector_bytes: int) -> None:
    pool = KVPool(5, head_dim=8, dtype=dtype)
    assert pool.nbytes == sum(tensor.nbytes for tensor in pool.blocks.tensors)
    assert pool.block_bytes == 2 * 16 * vector_bytes
    heap = HeapBlocks(8, dtype, "cpu")
    runs = heap.take(5)
    assert heap.taken_bytes == pool.nbytes
    heap.give_back(runs)
    assert heap.taken_bytes == 0


def test_an_empty_pool_refuses() -> None:
    with pytest.raises(BudgetExceeded):
        pool_of(0).take(1)


def test_blocks_that_were_not_given_back_are_found() -> None:
    pool = KVPool(8, 4, torch.float32)
    runs = pool.take(3)
    pool.check_integrity()
    with pytest.raises(RuntimeError, match="3 blocks"):
        pool.check_integrity(all_free=True)
    pool.give_back(runs)
    pool.check_integrity(all_free=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", [KVPool, HeapBlocks])
def test_entries_go_where_they_are_said_to_and_nowhere_else(kind: type, dtype: torch.dtype) -> None:
    """The last slot of a run, the first of another, and one inside."""
    blocks = KVPool(6, 4, dtype) if kind is KVPool else HeapBlocks(4, dtype, "cpu")
    runs = [*blocks.take(2), *blocks.take(3)]
    for run in runs:
        blocks.entries(run).each(lambda part: bits(part).zero_())
    entries = stored(torch.randn(3, 1, 4), torch.randn(3, 1, 4), dtype)
    places = [Place(runs[0], 31), Place(runs[1], 0), Place(runs[1], 21)]
    blocks.store(places, entries)
    held = [blocks.entries(run).each(lambda part: part.flatten(0, 1)) for run in runs]
    for at, tensor in enumerate(entries.tensors):
        mine = [bits(part.tensors[at]) for part in held]
        there = [mine[0][31], mine[1][0], mine[1][21]]
        assert torch.equal(torch.stack(there), bits(tensor)[:, 0])
        assert sum(int(part.count_nonzero()) for part in mine) == int(bits(tensor).count_nonzero())


def test_blocks_made_in_inference_can_be_written_to_outside() -> None:
    with torch.inference_mode():
        heap = HeapBlocks(4, torch.int8, "cpu")
        (run,) = heap.take(2)
    entries = stored(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.int8)
    heap.store([Place(run, 5)], entries)
    assert int(heap.entries(run).keys.flatten(0, 1)[5, 0]) == 127
