"""Adapters of Larimar, from and to files."""

from pathlib import Path
from typing import Any

import numpy
import pytest
from safetensors.numpy import save

from ullage.errors import TechniqueError
from ullage.specs.learned import tensors_sha256
from ullage.specs.sources import resolve
from ullage.techniques import parse
from ullage.techniques.larimar.adapter import ADAPTERS, LIMIT_BYTES, Adapter

RANDOM = numpy.random.default_rng(0)


def adapter_of(layers: int = 2, heads: int = 2, head_dim: int = 8, rank: int = 3) -> Adapter:
    mean, basis = (
        RANDOM.standard_normal((*first, layers, heads, head_dim), numpy.float32)
        for first in ((2,), (rank, 2))
    )
    return Adapter(mean, numpy.ones((2, layers), numpy.float32), basis, "of nobody", {"facts": 9})


def tensors(**changes: Any) -> dict[str, numpy.ndarray]:
    made = adapter_of()
    mean, basis = made.mean.astype("f2"), made.basis.astype("f2")
    return {"mean": mean, "scale": made.scale, "basis": basis} | changes


def write(path: Path, content: dict[str, numpy.ndarray], **changes: str) -> str:
    """A file of an adapter as whoever means ill would write it; its name."""
    metadata = {"format": "ullage-larimar-1", "fingerprint": "of nobody", "record": "{}"}
    metadata["sha256"] = tensors_sha256(save(content))
    path.write_bytes(save(content, metadata | changes))
    return str(path)


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    """In fp16, which is computed with in fp32."""
    made, path = adapter_of(), tmp_path / "made.safetensors"
    made.save(path)
    loaded = ADAPTERS.load(str(path))
    assert (loaded.fingerprint, loaded.record) == ("of nobody", {"facts": 9})
    for one, other in ((loaded.mean, made.mean), (loaded.basis, made.basis)):
        assert numpy.array_equal(one, other.astype(numpy.float16))
    assert numpy.array_equal(loaded.scale, made.scale)
    assert loaded.nbytes == made.nbytes == 4 * (64 + 4 + 3 * 64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mean": numpy.zeros((2, 2, 2, 8), "f4")}, "mean is in F32, not in F16"),
        ({"mean": numpy.zeros((2, 2, 8), "f2")}, "do not go together"),
        ({"basis": numpy.zeros((3, 2, 2, 2, 9), "f2")}, "do not go together"),
        ({"basis": numpy.zeros((3, 64), "f2")}, "do not go together"),
        ({"scale": numpy.ones((2, 3), "f4")}, "do not go together"),
        ({"scale": numpy.zeros((2, 2), "f4")}, "not positive"),
        ({"scale": numpy.full((2, 2), numpy.nan, "f4")}, "no number"),
        ({"basis": numpy.full((3, 2, 2, 2, 8), numpy.inf, "f2")}, "no number"),
        ({"basis": numpy.zeros((0, 2, 2, 2, 8), "f2")}, "no keys and values"),
    ],
)
def test_tensors_that_cannot_be(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    file = write(tmp_path / "bad.safetensors", tensors(**changes))
    with pytest.raises(TechniqueError, match=f"not an adapter of Larimar, or damaged: .*{says}"):
        ADAPTERS.load(file)


@pytest.mark.parametrize(
    "changes",
    [{"format": "ullage-dms-1"}, {"sha256": "0"}, {"record": "["}, {"record": "3"},
     {"record": "[" * 100_000}],
    ids=lambda changes: str(changes)[:30],
)  # fmt: skip
def test_metadata_that_cannot_be(tmp_path: Path, changes: dict[str, str]) -> None:
    file = write(tmp_path / "bad.safetensors", tensors(), **changes)
    with pytest.raises(TechniqueError, match="not an adapter of Larimar, or damaged"):
        ADAPTERS.load(file)


def test_a_file_without_a_part_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    for name in ("mean", "scale", "basis"):
        content = tensors()
        del content[name]
        with pytest.raises(TechniqueError, match="damaged"):
            ADAPTERS.load(write(path, content))
    whole = path.read_bytes()
    for end in (0, 7, len(whole) - 1):
        path.write_bytes(whole[:end])
        with pytest.raises(TechniqueError, match="damaged"):
            ADAPTERS.load(str(path))
    with path.open("wb") as file:
        file.truncate(LIMIT_BYTES + 1)
    with pytest.raises(TechniqueError, match="too large"):
        ADAPTERS.load(str(path))


def test_readout_and_adapter_go_together(tmp_path: Path) -> None:
    path = tmp_path / "made.safetensors"
    adapter_of().save(path)
    for settings in ("readout=latent", f"adapter={path}", f"readout=kv,adapter={path}"):
        with pytest.raises(TechniqueError, match="readout=latent and adapter=NAME go together"):
            parse(f"larimar:{settings}")
    with pytest.raises(TechniqueError, match="neither a file nor one of those that are shipped"):
        parse("larimar:readout=latent,adapter=of-nobody")
    assert parse(f"larimar:readout=latent,adapter={path}")


def test_an_adapter_of_another_shape_is_refused_before_weights_are_read(tmp_path: Path) -> None:
    path, ledger = tmp_path / "made.safetensors", tmp_path / "facts.db"
    adapter_of().save(path)
    ledger.touch()
    chosen = parse(f"larimar:ledger={ledger},readout=latent,adapter={path}")
    reason = chosen.unsupported(resolve("llama-3.1-8b"))
    assert reason is not None
    assert "of 2 layers, 2 KV heads and head size 8, and this has 32, 8 and 128" in reason


def test_what_is_shipped_is_for_its_model() -> None:
    assert ADAPTERS.names() == ["smollm2-135m"]
    adapter = ADAPTERS.load("smollm2-135m")
    assert adapter.unsuited(resolve("smollm2-135m")) is None
    assert adapter.record["model"] == "smollm2-135m"
