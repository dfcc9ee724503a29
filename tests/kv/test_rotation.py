"""Angles that are learned from what turns tokens, and turns by them."""

import pytest
import torch

from ullage.kv.rotation import Angles, Turn, after, normed, rotated

STEP = 10000.0 ** -(torch.arange(8) / 8)  # [rot / 2]


def turn(positions: torch.Tensor, dtype: torch.dtype = torch.float32, longer: float = 1.0) -> Turn:
    angle = (positions[:, None].double() * STEP.double()).repeat(1, 2)
    return (longer * angle.cos()).to(dtype), (longer * angle.sin()).to(dtype)


def learned(dtype: torch.dtype, sizes: list[int], longer: float = 1.0, first: int = 0) -> Angles:
    angles, at = Angles(), 0
    for size in sizes:
        angles.see(at, *turn(torch.arange(first + at, first + at + size), dtype, longer))
        at += size
    return angles


@pytest.mark.parametrize("sizes", [[700], [1] * 700, [3, 1, 60, 636]])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize(("longer", "first"), [(1.0, 0), (1.3, 0), (1.0, 37)])
def test_they_are_those_of_the_model(
    sizes: list[int], dtype: torch.dtype, error: float, longer: float, first: int
) -> None:
    """Also of a text that begins behind padding, and of a model that lengthens what it turns."""
    asked = torch.tensor([-1000.0, -1.0, 0.0, 300.0, 1000.0])
    found = learned(dtype, sizes, longer, first).turn(asked)
    for part, expected in zip(found, turn(asked), strict=True):
        torch.testing.assert_close(part, expected, atol=error, rtol=0)


def test_two_tokens_are_enough_for_a_few() -> None:
    found = learned(torch.float32, [1, 1]).turn(torch.arange(4))
    for part, expected in zip(found, turn(torch.arange(4)), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)


def test_one_token_is_not() -> None:
    with pytest.raises(RuntimeError, match="two tokens"):
        learned(torch.float32, [1]).turn(torch.arange(4))


def test_a_turn_after_a_turn_is_their_sum() -> None:
    first, then = torch.tensor([3, 40]), torch.tensor([-5, 7])
    for part, expected in zip(after(turn(first), turn(then)), turn(first + then), strict=True):
        torch.testing.assert_close(part, expected, atol=1e-5, rtol=0)


def test_what_is_turned_back_is_as_it_was() -> None:
    states = torch.randn(2, 5, 20, generator=torch.Generator().manual_seed(1))
    cos, sin = normed(*turn(torch.arange(5), longer=1.3))
    back = rotated(rotated(states, cos, sin), cos, -sin)
    torch.testing.assert_close(back, states, atol=1e-5, rtol=1e-5)
    assert torch.equal(rotated(states, cos, sin)[..., 16:], states[..., 16:])
