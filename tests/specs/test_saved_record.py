"""What a saved text says of itself, and files that are none."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from ullage import ModelSpec
from ullage.errors import InputError
from ullage.specs.saved import FORMAT, Record, read_saved

RECORD = Record("m", 2, 2, 8, "f", "{}", "camelot:slots=8", "fp32", 70, None, "book.txt", "s")
NO_BANK = "no bank: `ullage read MODEL DOC --save FILE` writes one"
WRITTEN = {"format": FORMAT, "record": json.dumps(asdict(RECORD)), "sha256": "0"}


def write(path: Path, metadata: dict[str, str]) -> None:
    tensors = {f"{layer}.ring.keys": numpy.zeros((2, layer)) for layer in (1, 10)}
    save_file(tensors, path, metadata)


def test_the_record_and_each_layers_tensors(tmp_path: Path) -> None:
    write(tmp_path / "bank", WRITTEN)
    found = read_saved(tmp_path / "bank")
    assert found.record == RECORD
    assert [one.shape for one in found.of_layer(1).values()] == [(2, 1)]
    assert list(found.of_layer(10)) == ["ring.keys"]
    assert found.of_layer(0) == {}


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({}, NO_BANK),
        ({"format": "pt"}, NO_BANK),
        (WRITTEN | {"format": "ullage-bank-1"}, f"this ullage reads {FORMAT}"),
        ({"format": FORMAT}, "is damaged: 'record'"),
        (WRITTEN | {"record": "{"}, "is damaged"),
        (WRITTEN | {"record": "[" * 10**5}, "is damaged"),
        (WRITTEN | {"record": "[]"}, "is damaged"),
        (WRITTEN | {"record": "{}"}, "is damaged"),
        (WRITTEN | {"record": json.dumps(asdict(RECORD) | {"tokens": -1})}, "is damaged"),
        (WRITTEN | {"record": json.dumps(asdict(RECORD) | {"tokens": 0})}, "of no token"),
    ],
)
def test_what_is_no_bank_of_this_format_is_refused(
    tmp_path: Path, metadata: dict[str, str], says: str
) -> None:
    write(tmp_path / "bank", metadata)
    with pytest.raises(InputError, match=says):
        read_saved(tmp_path / "bank")


@pytest.mark.parametrize("content", [None, b"", b"once upon a time", b"\x02\0\0\0\0\0\0\0[]"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "bank").write_bytes(content)
    with pytest.raises(InputError, match=r"No bank can be read.+`ullage read MODEL"):
        read_saved(tmp_path / "bank")


def test_metadata_that_are_no_texts_are_refused(tmp_path: Path) -> None:
    header = json.dumps({"__metadata__": {"format": 1}}).encode()
    (tmp_path / "bank").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="no texts by name"):
        read_saved(tmp_path / "bank")


def test_a_model_of_another_shape_is_known_by_it(tiny_spec: Callable[..., ModelSpec]) -> None:
    spec = tiny_spec("llama")
    own = replace(RECORD, layers=spec.num_layers, head_dim=spec.head_dim)
    assert own.unsuited(spec) is None
    assert "a model of 3 layers" in str(replace(own, layers=3).unsuited(spec))
    assert replace(own, kv_heads=4).unsuited(spec)
    assert replace(own, head_dim=16).unsuited(spec)
