"""Adapters: files whole or refused, and windows shared out with the least loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors.torch import save

from ullage import ModelSpec, TechniqueChoice, resolve
from ullage.errors import TechniqueError
from ullage.specs.learned import tensors_sha256
from ullage.techniques import create, parse
from ullage.techniques.dms.adapter import (
    ADAPTERS,
    DECIDED_TOKENS,
    Adapter,
)
from ullage.techniques.dms.settings import DMS

WINDOWS = (2, 4, 8)
EVEN = numpy.arange(1, DECIDED_TOKENS + 1, dtype=numpy.float32) / DECIDED_TOKENS


def adapter_of(loss: list[list[list[float]]]) -> Adapter:
    numbers = numpy.array(loss, numpy.float32)
    captured = numpy.broadcast_to(EVEN, (*numbers.shape[:2], DECIDED_TOKENS))
    return Adapter(WINDOWS, numbers, captured, 16, "print", {"texts": 1})


def as_saved(tensors: dict[str, Any], record: str = "{}") -> bytes:
    """A file of these tensors, with the sum of their bytes."""
    both = {name: torch.as_tensor(tensor) for name, tensor in tensors.items()}
    metadata = {"format": "ullage-dms-3", "head_dim": "4", "fingerprint": "x", "record": record}
    return save(both, metadata | {"sha256": tensors_sha256(save(both))})


def test_a_file_holds_it_all(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    adapter = adapter_of([[[3, 2, 1]]])
    adapter.save(path)
    read = ADAPTERS.load(str(path))
    assert numpy.array_equal(read.loss, adapter.loss)
    assert numpy.array_equal(read.captured, adapter.captured)
    assert (read.windows, read.head_dim, read.fingerprint, read.record) == (
        WINDOWS, 16, "print", {"texts": 1},
    )  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    """As after `ullage train dms`, in the same process; and one that did not change is not."""
    path = tmp_path / "mine.safetensors"
    for fingerprint in ("one", "two"):  # of one length, and within a tick of the clock perhaps
        replace(adapter_of([[[3, 2, 1]]]), fingerprint=fingerprint).save(path)
        assert ADAPTERS.load(str(path)).fingerprint == fingerprint
    assert ADAPTERS.load(str(path)) is ADAPTERS.load(str(path))
    path.write_bytes(b"damaged")
    with pytest.raises(TechniqueError, match="damaged"):
        ADAPTERS.load(str(path))
    path.unlink()
    with pytest.raises(TechniqueError, match="neither a file nor"):
        ADAPTERS.load(str(path))


def test_damaged_files_are_our_error(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    adapter_of([[[3, 2, 1]]]).save(path)
    whole = path.read_bytes()
    for number, damaged in enumerate(
        (b"", whole[:40], whole[:-3], whole.replace(b"ullage-dms-3", b"something-else"),
         whole.replace(b"windows", b"widnows"), b"\x00" * (3 << 20))
    ):  # fmt: skip
        other = tmp_path / f"{number}.safetensors"
        other.write_bytes(damaged)
        with pytest.raises(TechniqueError, match="dms: "):
            parse(f"dms:adapter={other}")


def test_numbers_that_are_not_those_saved_are_our_error(tmp_path: Path) -> None:
    """Of a tensor whose every byte is a number that there can be."""
    path = tmp_path / "mine.safetensors"
    weights = numpy.random.default_rng(0).normal(size=(1, 1, 500)).astype(numpy.float32)
    replace(adapter_of([[[3, 2, 1]]]), predictors={"dms": weights}).save(path)
    content = bytearray(path.read_bytes())
    content[-400:-300] = bytes(byte ^ 1 for byte in content[-400:-300])
    path.write_bytes(content)
    with pytest.raises(TechniqueError, match="damaged: its numbers are not those that were saved"):
        ADAPTERS.load(str(path))


def test_what_is_shipped_is_whole() -> None:
    assert [len(ADAPTERS.load(name).windows) > 1 for name in ADAPTERS.names()] == [True]


@pytest.mark.parametrize("numbers", [[[[3.0, float("nan"), 1.0]]], [[3.0, 2.0, 1.0]]])
def test_numbers_that_no_measurement_gives_are_our_error(tmp_path: Path, numbers: list) -> None:  # type: ignore[type-arg]
    path = tmp_path / "mine.safetensors"
    adapter_of(numbers).save(path)
    with pytest.raises(TechniqueError, match="damaged"):
        ADAPTERS.load(str(path))


def test_what_was_learned_is_read_as_it_was_but_for_rounding(tmp_path: Path) -> None:
    path = tmp_path / "mine.safetensors"
    weights = numpy.random.default_rng(0).normal(size=(1, 1, 50)).astype(numpy.float32)
    weights[0, 0, 7] = 20.0
    replace(adapter_of([[[3, 2, 1]]]), predictors={"dms": weights, "linear": 0 * weights}).save(
        path
    )
    read = ADAPTERS.load(str(path)).predictors
    assert numpy.abs(read["dms"] - weights).max() <= 10 / 127
    assert not read["linear"].any()


@pytest.mark.parametrize(
    "damaged",
    [{"captured": EVEN[None, None, 1:]}, {"captured": 2 * EVEN[None, None]},
     {"captured": torch.from_numpy(EVEN[None, None]).bfloat16()},
     {"loss": torch.ones(1, 1, 3).int()},
     {"dms": numpy.ones((1, 2, 4), numpy.int8)}, {"dms": numpy.ones((1, 1, 4), numpy.float32)},
     {"dms.scales": numpy.full((1, 1), numpy.nan, numpy.float32)}],
    ids=str,
)  # fmt: skip
def test_what_nothing_learns_is_our_error(tmp_path: Path, damaged: dict[str, Any]) -> None:
    path = tmp_path / "mine.safetensors"
    tensors: dict[str, Any] = {
        "windows": numpy.array(WINDOWS, numpy.int32),
        "loss": numpy.ones((1, 1, 3), numpy.float32),
        "captured": EVEN[None, None],
        "dms": numpy.ones((1, 1, 4), numpy.int8),
        "dms.scales": numpy.ones((1, 1), numpy.float32),
    }
    path.write_bytes(as_saved(tensors))
    assert set(ADAPTERS.load(str(path)).predictors) == {"dms"}
    path.write_bytes(as_saved(tensors | damaged))
    with pytest.raises(TechniqueError, match="damaged"):
        ADAPTERS.load(str(path))


@pytest.mark.parametrize("record", ["[1]", "{", "[" * 100_000])
def test_a_record_that_is_none_is_our_error(tmp_path: Path, record: str) -> None:
    path = tmp_path / "mine.safetensors"
    tensors = {
        "windows": numpy.array(WINDOWS, numpy.int32),
        "loss": numpy.ones((1, 1, 3), numpy.float32),
        "captured": EVEN[None, None],
    }
    path.write_bytes(as_saved(tensors, record))
    with pytest.raises(TechniqueError, match="damaged"):
        ADAPTERS.load(str(path))


def test_an_adapter_of_a_large_model_is_read(tmp_path: Path) -> None:
    """As of Llama 3.1 8B, with both predictors."""
    path = tmp_path / "mine.safetensors"
    weights = numpy.ones((32, 8, 4096), numpy.float32)
    loss = numpy.zeros((32, 8, 3), numpy.float32)
    captured = EVEN + numpy.zeros((32, 8, 1))
    learned = {"linear": weights, "dms": weights}
    Adapter(WINDOWS, loss, captured, 128, "print", {}, learned).save(path)
    assert path.stat().st_size > 2 << 20
    assert ADAPTERS.load(str(path)).unsuited(resolve("llama-3.1-8b")) is None


@pytest.mark.parametrize("windows", [[[2, 4, 8]], 2, [], [2.5, 4, 8], [4, 2, 8], [0, 2, 4]])
def test_windows_that_are_none_are_our_error(tmp_path: Path, windows: Any) -> None:
    path = tmp_path / "mine.safetensors"
    tensors = {
        "windows": numpy.array(windows, None if windows == [2.5, 4, 8] else numpy.int32),
        "loss": numpy.ones((1, 1, 3), numpy.float32),
        "captured": EVEN[None, None],
    }
    path.write_bytes(as_saved(tensors))
    with pytest.raises(TechniqueError, match="damaged"):
        ADAPTERS.load(str(path))


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
    Adapter((4, 8, 96), loss, EVEN + numpy.zeros((2, 2, 1)), spec.head_dim, "print", {}).save(path)
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
