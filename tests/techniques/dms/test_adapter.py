"""Adapters: files whole or refused, and windows shared out with the least loss."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from safetensors.numpy import save

from ullage import ModelSpec, TechniqueChoice, resolve
from ullage.errors import TechniqueError
from ullage.techniques import create, parse
from ullage.techniques.dms.adapter import Adapter, load_adapter, look_back
from ullage.techniques.dms.settings import DMS

WINDOWS = (2, 4, 8)
CONTEXT = 16
curves = st.lists(st.integers(0, 50), min_size=3, max_size=3).map(
    lambda drops: [sum(drops[at:]) for at in range(3)]
)


def adapter_of(loss: list[list[list[float]]]) -> Adapter:
    return Adapter(WINDOWS, numpy.array(loss, numpy.float32), 16, "print", {"texts": 1})


def lost(adapter: Adapter, windows: Sequence[Sequence[int]]) -> float:
    sizes = [*WINDOWS, CONTEXT]
    flat = adapter.loss.reshape(-1, 3)
    chosen = [sizes.index(size) for layer in windows for size in layer]
    return sum(float(curve[at]) if at < 3 else 0.0 for curve, at in zip(flat, chosen, strict=True))


@given(st.lists(curves, min_size=3, max_size=3), st.integers(2, CONTEXT))
@hypothesis_settings(max_examples=200)
def test_windows_lose_least(loss: list[list[float]], average: int) -> None:
    """Against every choice that is smaller by the largest step: the last may not have fitted."""
    adapter = adapter_of([loss])
    windows = look_back(adapter, average, CONTEXT)
    assert sum(windows[0]) <= average * 3
    for choice in product([*WINDOWS, CONTEXT], repeat=3):
        if sum(choice) <= average * 3 - (CONTEXT - WINDOWS[0]):
            assert lost(adapter, windows) <= lost(adapter, [list(choice)]) + 1e-6


def test_windows_by_hand() -> None:
    """The second head gains most a token by far; then the fourth would, but only the third's step
    still fits; the first gains nothing but by seeing all."""
    adapter = adapter_of([[[1, 1, 1], [90, 60, 20]], [[5, 4, 4], [8, 6, 0]]])
    assert look_back(adapter, 2, CONTEXT) == ((2, 2), (2, 2))
    assert look_back(adapter, 4, CONTEXT) == ((2, 8), (4, 2))
    assert look_back(adapter, CONTEXT, CONTEXT) == ((16, 16), (16, 8))


def test_a_context_below_some_windows_needs_none_of_them() -> None:
    adapter = adapter_of([[[9, 5, 5]]])
    assert look_back(adapter, 6, 6) == ((6,),)


def test_a_window_below_the_least_is_our_error() -> None:
    with pytest.raises(TechniqueError, match="1 tokens on average is below"):
        look_back(adapter_of([[[1, 1, 1]]]), 1, CONTEXT)


def test_a_file_holds_it_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    adapter = adapter_of([[[3, 2, 1]]])
    adapter.save(path)
    read = load_adapter(str(path))
    assert numpy.array_equal(read.loss, adapter.loss)
    assert (read.windows, read.head_dim, read.fingerprint, read.record) == (
        WINDOWS, 16, "print", {"texts": 1},
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    """As after `ullage train dms`, in the same process; and one that did not change is not."""
    path = tmp_path / "mine.safetensors"
    for fingerprint in ("one", "two"):  # of one length, and within a tick of the clock perhaps
        replace(adapter_of([[[3, 2, 1]]]), fingerprint=fingerprint).save(path)
        assert load_adapter(str(path)).fingerprint == fingerprint
    assert load_adapter(str(path)) is load_adapter(str(path))
    path.write_bytes(b"damaged")
    with pytest.raises(TechniqueError, match="damaged"):
        load_adapter(str(path))
    path.unlink()
    with pytest.raises(TechniqueError, match="neither a file nor"):
        load_adapter(str(path))


def test_damaged_files_are_our_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    adapter_of([[[3, 2, 1]]]).save(path)
    whole = path.read_bytes()
    for number, damaged in enumerate(
        (b"", whole[:40], whole[:-3], whole.replace(b"ullage-dms-2", b"something-else"),
         whole.replace(b"windows", b"widnows"), b"\x00" * (3 << 20))
    ):  # fmt: skip
        other = tmp_path / f"{number}.safetensors"
        other.write_bytes(damaged)
        with pytest.raises(TechniqueError, match="dms: "):
            parse(f"dms:adapter={other}")


@pytest.mark.parametrize("numbers", [[[[3.0, float("nan"), 1.0]]], [[3.0, 2.0, 1.0]]])
def test_numbers_that_no_measurement_gives_are_our_error(tmp_path: Path, numbers: list) -> None:  # type: ignore[type-arg]
    path = tmp_path / "mine.safetensors"
    adapter_of(numbers).save(path)
    with pytest.raises(TechniqueError, match="damaged"):
        load_adapter(str(path))


@pytest.mark.parametrize("windows", [[[2, 4, 8]], 2, [], [2.0, 4.0, 8.0], [4, 2, 8], [0, 2, 4]])
def test_windows_that_are_none_are_our_error(tmp_path: Path, windows: Any) -> None:
    path = tmp_path / "mine.safetensors"
    tensors = {"windows": numpy.array(windows), "loss": numpy.ones((1, 1, 3), numpy.float32)}
    metadata = {"format": "ullage-dms-2", "head_dim": "4", "fingerprint": "x", "record": "{}"}
    path.write_bytes(save(tensors, metadata))
    with pytest.raises(TechniqueError, match="damaged"):
        load_adapter(str(path))


@pytest.mark.parametrize("adapter", [5, True, [1], None])
def test_an_adapter_that_is_no_name_is_our_error(adapter: Any) -> None:
    with pytest.raises(TechniqueError, match="adapter is a name or a path"):
        create(TechniqueChoice("dms", {"adapter": adapter}))


def test_what_is_far_below_the_average_is_decided_in_time(
    tmp_path: Path, tiny_spec: Callable[..., ModelSpec]
) -> None:
    """Nothing may leave the least window undecided."""
    spec, path = tiny_spec("llama"), tmp_path / "mine.safetensors"
    loss = numpy.zeros((2, 2, 3), numpy.float32)
    loss[1, 1] = 9.0, 8.0, 7.0
    Adapter((4, 8, 96), loss, spec.head_dim, "print", {}).save(path)
    survivals = DMS(0.5, 80, adapter=str(path)).survivals(spec)
    windows = [survival.window for layer in survivals.values() for survival in layer]
    assert windows == [4, 4, 4, 256]
    assert {survival.every for layer in survivals.values() for survival in layer} == {4}


def test_an_adapter_that_is_not_there_is_our_error() -> None:
    with pytest.raises(TechniqueError, match="neither a file nor one of"):
        parse("dms:adapter=of-nobody")


def test_an_adapter_of_another_shape_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    adapter_of([[[3, 2, 1]]]).save(path)
    reason = parse(f"dms:adapter={path}").unsupported(resolve("llama-3.1-8b"))
    assert reason is not None
    assert "1 layers, 1 KV heads" in reason
    assert "32, 8 and 128" in reason
