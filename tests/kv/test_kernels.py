"""Every kernel against softmax attention written out by hand."""

import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from ullage.kv import kernels
from ullage.kv.attention import kernel_for
from ullage.kv.entries import stored
from ullage.kv.kernels import Joined, Kernel, Piece, cpu, reference, threads
from ullage.specs.tiles import TILE_TOKENS, tile_scores

KERNELS: dict[str, Kernel] = {"reference": reference.attend, "cpu": cpu.attend}
SCALE = 0.3
HIDDEN = torch.finfo(torch.float32).min / 2  # a bias


@pytest.fixture(params=[*KERNELS, pytest.param("triton", marks=pytest.mark.triton)])
def kernel(request: pytest.FixtureRequest) -> Kernel:
    found: Kernel = KERNELS.get(request.param) or request.getfixturevalue("triton_kernel")
    return found


def entries(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def piece(
    seed: int,
    tokens: int,
    kv_heads: int = 2,
    dtype: torch.dtype = torch.float32,
    *,
    causal: bool = False,
    mask: torch.Tensor | None = None,
) -> Piece:
    keys, values = (entries(seed + at, kv_heads, tokens, 8) for at in (0, 1))
    return Piece.of(stored(keys, values, dtype), causal, mask)


def parts_of(piece: Piece) -> list[torch.Tensor]:
    """K and V in double precision, [Hkv, T, D] each."""
    numbers, scales = (piece.keys, piece.values), (piece.key_scales, piece.value_scales)
    return [
        part.double() if scale is None else part.double() * scale.double()[:, :, None]
        for part, scale in zip(numbers, scales, strict=True)
    ]


def by_hand(query: torch.Tensor, pieces: list[Piece], softcap: float | None) -> torch.Tensor:
    """One head and one query at a time, in double precision."""
    output = torch.empty_like(query, dtype=torch.float64)
    group = query.shape[0] // pieces[0].keys.shape[0]
    for head in range(query.shape[0]):
        for n in range(query.shape[1]):
            keys, values = [], []
            for part in pieces:
                sees = torch.ones(part.keys.shape[1], dtype=torch.bool)
                if part.causal:
                    sees = torch.arange(part.keys.shape[1]) <= n
                elif part.mask is not None:
                    sees = part.mask[n]
                for mine, its in zip((keys, values), parts_of(part), strict=True):
                    mine.append(its[head // group, sees])
            scores = torch.cat(keys) @ query[head, n].double() * SCALE
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            output[head, n] = scores.softmax(0) @ torch.cat(values)
    return output


def check(kernel: Kernel, query: torch.Tensor, pieces: list[Piece], softcap: float | None) -> None:
    output = kernel(query, pieces, SCALE, softcap)
    assert output.shape == query.shape
    assert output.dtype == query.dtype
    tolerance = 1e-5 if query.dtype == torch.float32 else 2e-2
    expected = by_hand(query, pieces, softcap)
    torch.testing.assert_close(output.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (6, 2), (5, 1)])
def test_one_token_over_its_past(
    kernel: Kernel, heads: int, kv_heads: int, softcap: float | None
) -> None:
    check(kernel, entries(1, heads, 1, 8), [piece(2, 37, kv_heads)], softcap)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("queries", [1, 7])
@pytest.mark.parametrize("stored_dtype", [torch.int8, torch.float8_e4m3fn])
def test_entries_with_scales(
    kernel: Kernel,
    stored_dtype: torch.dtype,
    queries: int,
    query_dtype: torch.dtype,
    softcap: float | None,
) -> None:
    """Around tiles, under a mask, of some heads alone, and beside entries of another format."""
    query = entries(1, 4, queries, 8).to(query_dtype)
    mask = torch.arange(12)[None, :] % 3 < 2 + torch.arange(queries)[:, None] % 2
    pieces = [
        piece(2, TILE_TOKENS + 1, dtype=stored_dtype),
        piece(4, 12, dtype=stored_dtype, mask=mask),
        piece(6, 5, dtype=query_dtype),
        piece(8, queries, dtype=stored_dtype, causal=True),
    ]
    check(kernel, query, pieces, softcap)
    halves = [
        replace(Piece.of(part.part(slice(None), slice(at, at + 1)), part.causal, part.mask),
                heads=slice(2 * at, 2 * at + 2))
        for part in pieces for at in (0, 1)
    ]  # fmt: skip
    torch.testing.assert_close(
        kernel(query, halves, SCALE, softcap), kernel(query, pieces, SCALE, softcap)
    )


def test_every_number_of_fp8_is_read(kernel: Kernel) -> None:
    """Subnormals, both zeros and both signs, by a token that sees one entry, whose V it copies."""
    bits = torch.arange(256, dtype=torch.uint8)
    bits = bits[bits & 0x7F != 0x7F]  # NaN, which entries do not hold
    values = bits.view(torch.float8_e4m3fn).view(1, 1, -1)
    scales = torch.full((1, 1), 2.0**-5, dtype=torch.bfloat16)
    part = Piece(values, values, scales, scales)
    output = kernel(torch.zeros(1, 1, len(bits)), [part], SCALE, None)
    torch.testing.assert_close(output, values.float() / 32, atol=0, rtol=1e-6)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_chunk_over_several_pieces_and_itself(
    kernel: Kernel, dtype: torch.dtype, softcap: float | None
) -> None:
    pieces = [
        piece(2, 16, dtype=dtype),
        piece(4, 32, dtype=dtype),
        piece(6, 3, dtype=dtype),
        piece(8, 9, dtype=dtype, causal=True),
    ]
    check(kernel, entries(1, 4, 9, 8), pieces, softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("queries", [1, 5])
def test_a_first_chunk_sees_itself_causally(
    kernel: Kernel, queries: int, dtype: torch.dtype
) -> None:
    check(kernel, entries(1, 4, queries, 8), [piece(2, queries, dtype=dtype, causal=True)], None)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_band(kernel: Kernel, dtype: torch.dtype, softcap: float | None) -> None:
    key, query = torch.arange(12)[None, :], torch.arange(5, 12)[:, None]
    mask = (key <= query) & (key > query - 4)
    check(kernel, entries(1, 4, 7, 8), [piece(2, 12, dtype=dtype, mask=mask)], softcap)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_query_may_see_none_of_a_piece(kernel: Kernel, dtype: torch.dtype) -> None:
    mask = torch.ones(7, 12, dtype=torch.bool)
    mask[3:] = False
    pieces = [piece(2, 12, dtype=dtype, mask=mask), piece(2, 7, dtype=dtype, causal=True)]
    check(kernel, entries(1, 4, 7, 8), pieces, None)


@pytest.mark.parametrize("tokens", [TILE_TOKENS - 1, TILE_TOKENS, TILE_TOKENS + 1, 2 * TILE_TOKENS])
def test_a_past_of_another_format_than_the_query_around_tiles(kernel: Kernel, tokens: int) -> None:
    pieces = [piece(2, tokens, dtype=torch.bfloat16), piece(4, 3, causal=True)]
    check(kernel, entries(1, 2, 3, 8), pieces, None)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_scores_are_tiled_where_they_are_many(
    softcap: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Causal pieces and bands too, of which some queries see nothing of a whole tile."""
    monkeypatch.setattr(reference, "tile_tokens", lambda rows: 4)
    key, query = torch.arange(30)[None, :], torch.arange(19, 30)[:, None]
    band = piece(2, 30, mask=(key <= query) & (key > query - 5))
    check(reference.attend, entries(1, 4, 11, 8), [band], softcap)
    pieces = [piece(2, 9, dtype=torch.bfloat16), piece(4, 11, causal=True)]
    check(reference.attend, entries(1, 4, 11, 8), pieces, softcap)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS.keys())
def test_scratch_does_not_grow_with_the_past(
    kernel: Kernel,
    dtype: torch.dtype,
    softcap: float | None,
    peak_of: Callable[[Callable[[], object]], int],
) -> None:
    query, new = entries(1, 4, 200, 8), piece(2, 200, causal=True)

    def scratch_bytes(past_tokens: int) -> int:
        past = piece(4, past_tokens, dtype=dtype)
        return peak_of(lambda: kernel(query, [past, new], SCALE, softcap))

    assert scratch_bytes(6000) == scratch_bytes(24_000) <= 4 * tile_scores(800, 24_000) + 2**20


def test_everything_in_bf16(kernel: Kernel) -> None:
    pieces = [piece(2, 40, dtype=torch.bfloat16), piece(4, 6, dtype=torch.bfloat16, causal=True)]
    check(kernel, entries(1, 4, 6, 8).bfloat16(), pieces, None)


def test_large_scores_do_not_overflow(kernel: Kernel) -> None:
    parts = [piece(2, 8), piece(4, 8)]
    loud = [Piece(part.keys * 300, part.values) for part in parts]
    check(kernel, entries(1, 2, 1, 8) * 10, loud, None)


def test_stored_entries_and_query_are_left_as_they_were(kernel: Kernel) -> None:
    query, parts = entries(1, 4, 3, 8), [piece(2, 20), piece(4, 3, causal=True)]
    before = [query.clone(), *(part.keys.clone() for part in parts), parts[0].values.clone()]
    kernel(query, parts, SCALE, None)
    after = [query, *(part.keys for part in parts), parts[0].values]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@pytest.mark.parametrize("split", [1, 7, 19])
def test_two_halves_joined_are_the_whole(split: int) -> None:
    scores, values = entries(1, 3, 2, 20), entries(2, 3, 20, 8)

    def part(span: slice) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = scores[..., span]
        return chosen.softmax(-1) @ values[:, span], chosen.logsumexp(-1)

    joined = Joined(torch.empty(3, 2, 8))
    joined.add(None, *part(slice(split)))
    joined.add(None, *part(slice(split, None)))
    torch.testing.assert_close(joined.output, scores.softmax(-1) @ values)


def test_a_negligible_part_changes_nothing() -> None:
    output = entries(1, 2, 1, 8)
    joined = Joined(output)
    joined.add(None, output.clone(), torch.full((2, 1), 200.0))
    joined.add(None, entries(2, 2, 1, 8), torch.full((2, 1), -200.0))
    assert torch.equal(joined.output, output)


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("queries", [1, 6])
def test_heads_attend_to_entries_of_their_own(
    kernel: Kernel, queries: int, softcap: float | None
) -> None:
    """A head's own entries, of any number, first or after those of all: as if each group of query
    heads had attended alone."""
    query = entries(1, 6, queries, 8)
    shared = piece(2, queries, causal=True)
    own = [piece(4, 9, 1), piece(6, 70, 1, mask=entries(7, queries, 70) > 0)]
    groups = [slice(0, 3), slice(3, 6)]
    for order in (1, -1):
        mine = [
            Piece(part.keys, part.values, mask=part.mask, heads=group)
            for part, group in zip(own, groups, strict=True)
        ]
        output = kernel(query, [shared, *mine][::order], SCALE, softcap)
        for head, group in enumerate(groups):
            here = slice(head, head + 1)
            alone = Piece(shared.keys[here], shared.values[here], causal=True)
            expected = by_hand(query[group], [alone, own[head]], softcap)
            torch.testing.assert_close(output[group].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_two_sequences_at_once_are_each_alone(kernel: Kernel, softcap: float | None) -> None:
    """Of two KV heads each: as further heads of one query."""
    query = entries(1, 12, 1, 8)
    parts = [[piece(2, 30), piece(4, 7)], [piece(6, 90)]]
    spans = [slice(0, 6), slice(6, 12)]
    pieces = [
        Piece(part.keys, part.values, heads=span)
        for mine, span in zip(parts, spans, strict=True)
        for part in mine
    ]
    output = kernel(query, pieces, SCALE, softcap)
    for mine, span in zip(parts, spans, strict=True):
        expected = by_hand(query[span], mine, softcap)
        torch.testing.assert_close(output[span].double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_heads_on_several_threads_are_as_on_one(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Heads of different lengths, one of more than a tile, one in two pieces."""
    tokens = [3000, 700, 1, 1500]
    pieces = [
        replace(piece(2 * at, count, 1, dtype), heads=slice(3 * at, 3 * at + 3))
        for at, count in enumerate(tokens)
    ]
    pieces.insert(1, replace(piece(20, 40, 1, dtype), heads=pieces[0].heads))
    query = entries(1, 12, 1, 8)
    shared = []
    monkeypatch.setattr(threads, "count", lambda calls: shared.append(calls) or 2)
    together = cpu.attend(query, pieces, SCALE)
    assert shared == [4]
    monkeypatch.setattr(threads, "count", lambda calls: 1)
    torch.testing.assert_close(together, cpu.attend(query, pieces, SCALE))
    expected = reference.attend(query, pieces, SCALE)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(together, expected, atol=tolerance, rtol=tolerance)


def test_each_device_has_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA without Triton, as on Windows, has the reference."""
    monkeypatch.delattr(kernels, "triton", raising=False)
    for name in ("triton", "ullage.kv.kernels.triton"):
        monkeypatch.setitem(sys.modules, name, None)
    found = {kind: kernel_for(torch.device(kind)) for kind in ("cpu", "cuda", "mps")}
    assert found == {"cpu": cpu.attend, "cuda": reference.attend, "mps": reference.attend}


@pytest.mark.triton
def test_cuda_has_triton() -> None:
    triton = pytest.importorskip("ullage.kv.kernels.triton")
    assert kernel_for(torch.device("cuda")) is triton.attend


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("new_tokens", "biases"), [(1, 1), (4, 1), (4, 4)])
def test_a_bias_is_added_and_a_piece_may_be_asked_something_else(
    kernel: Kernel, new_tokens: int, biases: int, softcap: float | None, dtype: torch.dtype
) -> None:
    """Entries as good as hidden, all of a query's too; long enough for several tiles."""
    query, other = (entries(seed, 4, new_tokens, 8) for seed in (1, 2))
    long = TILE_TOKENS + 9
    bias = entries(3, 2, biases, long)
    bias[0, 0], bias[1, -1, 3:] = HIDDEN, HIDDEN
    far = replace(piece(4, long, dtype=dtype), bias=bias, query=other)
    near = piece(6, 5)
    scores = []
    for asked, part in ((other, far), (query, near)):
        keys = parts_of(part)[0].repeat_interleave(2, 0)
        score = asked.double() @ keys.transpose(1, 2) * SCALE
        scores.append(score if softcap is None else softcap * torch.tanh(score / softcap))
    scores[0] += bias.double().repeat_interleave(2, 0)
    values = torch.cat([parts_of(part)[1] for part in (far, near)], 1).repeat_interleave(2, 0)
    expected = torch.cat(scores, 2).softmax(2) @ values
    for heads in (None, slice(0, 4)):
        seen = [replace(part, heads=heads) for part in (far, near)]
        output = kernel(query, seen, SCALE, softcap)
        torch.testing.assert_close(output.double(), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("few", [1, 13])
def test_a_token_sees_a_few_entries_beside_its_past(
    kernel: Kernel, few: int, dtype: torch.dtype
) -> None:
    """As of a fact that it is read behind: with a bias that may hide an entry. All KV heads of a
    row at once, or each by itself."""
    query, past = entries(1, 6, 1, 8), piece(2, 37, dtype=dtype)
    bias = entries(3, 2, 1, few)
    bias[0, 0, 0] = HIDDEN
    before = replace(piece(4, few, dtype=dtype), bias=bias)
    expected = reference.attend(query, [past, before], SCALE)
    for some in ([slice(0, 2)], [slice(0, 1), slice(1, 2)]):
        seen = [
            replace(part.of_heads(own), heads=slice(3 * own.start, 3 * own.stop))
            for own in some
            for part in (before, past)
        ]
        output = kernel(query, seen, SCALE, None)
        torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)
