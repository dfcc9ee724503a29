"""Triton's kernel where the others have no part: what it is given to do, and whether it compiles
for a GPU that is not there."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.kv.entries import stored
from ullage.kv.kernels import Kernel, Piece, reference
from ullage.kv.kernels.triton_work import Work, work_of
from ullage.specs.tiles import LEAST_SPLIT_TOKENS, SPLIT_PROGRAMS, rows_of_splits, split_rows

HEAD_DIM = 8
STORED = [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn]
CASES = [f"{step}{of}" for step in ("decode", "chunk") for of in ("", " int8", " fp8")]
CASES += ["decode bank", "chunk bank int8", "join"]


def some(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=generator)


@st.composite
def attentions(draw: st.DrawFn) -> tuple[torch.Tensor, list[Piece]]:
    """A query and pieces as rows hand them over: of all heads, of one, masked, causal, views of
    something wider, in several formats, some empty, some with a bias or asked something else."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 3, 7, 17]))
    queries = draw(st.sampled_from([1, 1, 2, 9, 33]))
    dims = draw(st.sampled_from([8, 16, 20, 32]))
    pieces = []
    for _ in range(draw(st.integers(0, 4))):
        tokens = draw(st.sampled_from([0, 1, 16, 130, 300]))
        own = draw(st.none() | st.integers(0, kv_heads - 1))
        dtype = draw(st.sampled_from(STORED))
        shape = (tokens + 3, kv_heads if own is None else 1, dims)
        numbers = (some(generator, *shape).transpose(0, 1) for _ in range(2))
        entries = stored(*numbers, dtype).part(slice(3, None))
        mask = some(generator, queries, tokens) > 0 if draw(st.booleans()) else None
        heads = None if own is None else slice(own * group, (own + 1) * group)
        piece = replace(Piece.of(entries, mask=mask), heads=heads)
        if draw(st.booleans()):
            shape = (len(entries.keys), draw(st.sampled_from([1, queries])), tokens + 2)
            piece = replace(piece, bias=some(generator, *shape)[..., 2:])
        if draw(st.booleans()):
            asked = some(generator, queries, len(entries.keys) * group, dims).transpose(0, 1)
            piece = replace(piece, query=asked)
        pieces.append(piece)
    new = (some(generator, kv_heads, queries, dims) for _ in range(2))
    pieces.insert(draw(st.integers(0, len(pieces))), Piece(*new, causal=True))
    query = some(generator, queries, kv_heads * group, dims).transpose(0, 1)
    return query, pieces


@pytest.mark.triton
@given(attentions(), st.sampled_from([None, 2.0]))
@settings(max_examples=12)
def test_it_is_the_reference(
    triton_kernel: Kernel, attention: tuple[torch.Tensor, list[Piece]], softcap: float | None
) -> None:
    query, pieces = attention
    output = triton_kernel(query, pieces, 0.4, softcap)
    expected = reference.attend(query, pieces, 0.4, softcap)
    torch.testing.assert_close(output, expected, atol=2e-5, rtol=2e-5)


def segments_of(work: Work) -> list[list[int]]:
    return work.numbers[: work.splits_at].reshape(-1, 17).tolist()


def splits_of(work: Work) -> list[list[int]]:
    return work.numbers[work.splits_at : work.order_at].reshape(-1, 4).tolist()


def read_by(work: Work, split: int) -> list[tuple[int, int]]:
    """The address of each key that a split reads and its segment, as a program works them out."""
    _, number, first, last = splits_of(work)[split]
    read = []
    for segment in range(first, last):
        _, tokens, before, keys, _, _, _, _, _, _, step, *_ = segments_of(work)[segment]
        start = max(number * work.split_size - before, 0)
        stop = min((number + 1) * work.split_size - before, tokens)
        read += [(keys + token * step * 4, segment) for token in range(start, stop)]
    return read


@given(
    st.lists(st.lists(st.integers(1, 900), min_size=1, max_size=3), min_size=1, max_size=4),
    st.sampled_from([1, 3, 70]),
)
@settings(max_examples=30)
def test_every_entry_is_read_once_by_its_own_heads(lengths: list[list[int]], queries: int) -> None:
    """Ragged: each KV head has a list of pieces of its own."""
    group = 2
    query = torch.zeros(group * len(lengths), queries, HEAD_DIM)
    pieces, expected = [], []
    for turn in range(3):  # the first of each head, then the second
        for lane, mine in enumerate(lengths):
            if turn < len(mine):
                keys = torch.empty(1, mine[turn], HEAD_DIM)
                heads = slice(lane * group, (lane + 1) * group)
                pieces.append(Piece(keys, keys, heads=heads))
                addresses = range(keys.data_ptr(), keys.data_ptr() + keys.nbytes, HEAD_DIM * 4)
                expected += [(address, lane) for address in addresses]
    work = work_of(query, pieces)
    reads = [read_by(work, split) for split in range(work.splits)]
    lanes = [lane for lane, *_ in splits_of(work)]
    found = [(at, lane) for lane, read in zip(lanes, reads, strict=True) for at, _ in read]
    assert sorted(found) == sorted(expected)
    assert all(0 < len(read) <= work.split_size for read in reads)
    rows = group * queries
    assert work.splits * rows <= rows_of_splits(rows, len(expected), len(lengths))


def test_splits_are_joined_lane_by_lane() -> None:
    """Of both formats: a head's past in bf16, and new entries of all heads."""
    past = torch.empty(1, 600, HEAD_DIM, dtype=torch.bfloat16)
    new = torch.empty(2, 5, HEAD_DIM)
    query = torch.zeros(4, 5, HEAD_DIM)
    pieces = [Piece(past, past, heads=slice(2, 4)), Piece(new, new, causal=True)]
    work = work_of(query, pieces)
    assert work.launches == [(torch.bfloat16, 0, 3), (torch.float32, 3, 5)]
    assert [lane for lane, *_ in splits_of(work)] == [1, 1, 1, 0, 1]
    order, bounds = work.numbers[work.order_at : work.bounds_at], work.numbers[work.bounds_at :]
    assert order.tolist() == [3, 0, 1, 2, 4]
    assert bounds.tolist() == [0, 1, 5]


@given(st.integers(1, 5000), st.integers(1, 10**7), st.integers(1, 64))
def test_splits_hold_more_as_anything_grows_and_never_too_much(
    rows: int, tokens: int, lists: int
) -> None:
    here = rows_of_splits(rows, tokens, lists)
    assert here <= rows_of_splits(rows + 1, tokens, lists)
    assert here <= rows_of_splits(rows, tokens + LEAST_SPLIT_TOKENS, lists)
    assert here <= rows * lists + SPLIT_PROGRAMS * split_rows(rows)


def test_entries_off_a_boundary_of_16_bytes_are_not_read_as_if_on_one() -> None:
    keys = torch.empty(1, 40, 8)
    query = torch.zeros(2, 1, 8)
    assert work_of(query, [Piece(keys, keys)]).aligned
    assert not work_of(query, [Piece(keys[..., 1:], keys[..., 1:])]).aligned
    assert not work_of(query, [Piece(keys[..., :6].contiguous(), keys)]).aligned
    narrow, wide = (stored(part, part, torch.int8) for part in (keys, torch.empty(1, 40, 16)))
    assert not work_of(query, [Piece.of(narrow)]).aligned
    assert work_of(query, [Piece.of(wide)]).aligned


@pytest.mark.triton
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capability", ["80", "90"])
def test_it_compiles_for_a_gpu(case: str, capability: str, tmp_path: Path) -> None:
    """To machine code of an A100 and an H100, with their matrix instructions, and entries copied 16
    bytes at a time into the 100 KiB that the smallest GPU of their kinds has for a program."""
    pytest.importorskip("triton")
    environment = dict(os.environ) | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = str(Path(__file__).with_name("compile_triton.py"))
    done = subprocess.run(
        [sys.executable, script, case, capability],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout)
    assert found["machine_code_bytes"] > 0
    assert found["shared_bytes"] <= 100 << 10
    if case != "join":
        assert found["matrix_products"] > 0
        assert found["copies_of_16_bytes"] > 0
