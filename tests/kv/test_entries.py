"""What an entry becomes in the pool's format, and what is read of it again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ullage.kv.entries import Entries, room_for, side_by_side, stored

FP8 = torch.float8_e4m3fn
SCALED = [torch.int8, FP8]
FORMATS = [torch.float32, torch.bfloat16, torch.float16, *SCALED]


def numbers(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def entries(tokens: int, dtype: torch.dtype, heads: int = 2) -> Entries:
    return stored(numbers(1, heads, tokens, 8), numbers(2, heads, tokens, 8), dtype)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4))
def test_int8_is_off_by_half_a_step_of_the_largest_at_most(vector: list[float]) -> None:
    """And by what the scale, of 8 bits itself, cuts off the largest: a quarter of a step."""
    keys = torch.tensor(vector)[None, None]
    made = stored(keys, -keys, torch.int8)
    step = keys.abs().amax() / 127
    error = (made.keys_in(torch.float32) - keys).abs().amax()
    assert error <= max(0.5 * (1 + 2**-8) * float(step), 1e-37)
    assert torch.equal(made.values_in(torch.float32), -made.keys_in(torch.float32))


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=4, max_size=4))
def test_fp8_is_off_by_a_sixteenth_of_each_number_at_most(vector: list[float]) -> None:
    """Or by half a step of its subnormals, of which the largest is 229,376; the scale cuts less off
    the largest than a step of it."""
    keys = torch.tensor(vector)[None, None]
    made = stored(keys, -keys, FP8)
    least = float(keys.abs().amax()) / 448 * 2**-9
    error = (made.keys_in(torch.float32) - keys).abs()
    assert (error <= (keys.abs() / 16).clamp(min=max(0.51 * least, 1e-37))).all()
    assert torch.equal(made.values_in(torch.float32), -made.keys_in(torch.float32))


@pytest.mark.parametrize("dtype", SCALED)
@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-30, 1.0, 3e38])
def test_scaled_formats_have_numbers_of_every_size(size: float, dtype: torch.dtype) -> None:
    read = stored(*[torch.full((1, 1, 4), size)] * 2, dtype).keys_in(torch.float32)
    assert torch.isfinite(read).all()
    torch.testing.assert_close(read, torch.full_like(read, size), rtol=0.005, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e-5, 1e-4, 1e-2, 1e4])
@pytest.mark.parametrize(("kept", "lost"), [(torch.int8, 0.01), (FP8, 0.03)])
def test_as_little_is_lost_of_small_numbers(
    kept: torch.dtype, lost: float, dtype: torch.dtype, size: float
) -> None:
    """In fp16 the scales of these are a few steps of its least number, or none. `size` is about the
    largest's third; fp16's own step is 6e-8."""
    keys = (numbers(1, 2, 64, 64) * size).to(dtype)
    read = stored(keys, keys, kept).keys_in(dtype)
    assert float((read - keys).float().norm() / keys.float().norm()) < lost


def test_fp8_loses_less_than_int8_only_beside_a_loud_channel() -> None:
    """So int8 is what is offered; a vector's loudest channel is its scale's."""

    def lost(keys: torch.Tensor, kept: torch.dtype) -> float:
        read = stored(keys, keys, kept).keys_in(torch.float32)
        return float((read - keys)[..., 1:].norm() / keys[..., 1:].norm())

    quiet = numbers(1, 2, 64, 64)
    assert lost(quiet, torch.int8) < lost(quiet, FP8) / 3
    loud = quiet.clone()
    loud[..., 0] = 60
    assert lost(loud, FP8) < lost(loud, torch.int8) / 2


def test_every_token_of_every_head_has_a_scale_of_its_own() -> None:
    """So that one loud token costs no other anything."""
    keys, values = numbers(1, 2, 6, 8), numbers(2, 2, 6, 8)
    loud = keys.clone()
    loud[0, 3] *= 1000
    quiet_read, loud_read = (stored(part, values, torch.int8) for part in (keys, loud))
    differs = (quiet_read.keys_in(torch.float32) != loud_read.keys_in(torch.float32)).any(-1)
    assert differs.nonzero().tolist() == [[0, 3]]
    assert torch.equal(quiet_read.values, loud_read.values)


@pytest.mark.parametrize("dtype", FORMATS)
def test_room_is_of_the_format_that_is_stored(dtype: torch.dtype) -> None:
    room, made = room_for(3, 8, dtype, "cpu"), entries(16, dtype, heads=3)
    assert [part.dtype for part in room.tensors] == [part.dtype for part in made.tensors]
    assert [part.shape for part in room.tensors] == [part.shape for part in made.tensors]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kept", FORMATS)
def test_side_by_side_they_are_the_same_numbers(kept: torch.dtype, dtype: torch.dtype) -> None:
    made = entries(20, kept)
    parts = [made.part(slice(0, 7)), made.part(slice(7, 8)), made.part(slice(8, 20))]
    keys, values = side_by_side(parts, dtype)
    assert torch.equal(keys, made.keys_in(dtype))
    assert torch.equal(values, made.values_in(dtype))


def test_a_part_is_a_view_of_everything() -> None:
    made = entries(20, torch.int8)
    part = made.part(slice(3, 9), slice(1, 2))
    assert len(part) == 6
    for whole, some in zip(made.tensors, part.tensors, strict=True):
        assert torch.equal(some, whole[1:2, 3:9])
        assert some.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


@pytest.mark.parametrize("dtype", FORMATS)
def test_tokens_are_copied_to_the_bit(dtype: torch.dtype) -> None:
    made, places = entries(20, dtype).part(slice(2, 18)), torch.tensor([3, 0, 11])
    for whole, some in zip(made.tensors, made.at(places).tensors, strict=True):
        assert some.dtype == whole.dtype
        assert torch.equal(some.float(), whole.float()[:, places])
