"""A safetensors header is believed only as far as the file bears it out."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ullage.errors import CheckpointError
from ullage.specs.safetensors import INDEX, has_weights, read_header, read_headers


def packed(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = packed(
    {
        "__metadata__": {"format": "pt"},
        "a": tensor([2, 2], 0, 16),
        "b": tensor([3], 16, 22, "BF16"),
    },
    bytes(22),
)


def shards(folder: Path, weight_map: dict[str, Any]) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    for name in ("one", "two"):
        (folder / f"{name}.safetensors").write_bytes(packed({name: tensor([1], 0, 4)}, bytes(4)))


def test_what_the_library_wrote_is_read(tmp_path: Path) -> None:
    weights = {
        "x": torch.arange(6, dtype=torch.bfloat16).reshape(2, 3),
        "y": torch.ones(4),
        "scalar": torch.tensor(1.0),
        "empty": torch.empty(0, 3),
    }
    save_file(weights, tmp_path / "model.safetensors")
    stored = {tensor.name: tensor for tensor in read_headers(tmp_path)}
    assert {name: entry.shape for name, entry in stored.items()} == {
        name: tuple(weight.shape) for name, weight in weights.items()
    }
    entry = stored["x"]
    raw = entry.file.read_bytes()[entry.begin : entry.end]
    read = torch.frombuffer(bytearray(raw), dtype=torch.bfloat16).reshape(entry.shape)
    assert entry.dtype == "BF16"
    assert torch.equal(read, weights["x"])


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    shards(tmp_path, {"one": "one.safetensors", "two": "two.safetensors"})
    assert [entry.file.name for entry in read_headers(tmp_path)] == [
        "one.safetensors",
        "two.safetensors",
    ]


def test_the_only_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "weights.safetensors").write_bytes(GOOD)
    assert [entry.name for entry in read_headers(tmp_path)] == ["a", "b"]


LIES = {
    "empty": b"",
    "seven bytes": bytes(7),
    "header of 2^60 bytes": (1 << 60).to_bytes(8, "little") + b"{}",
    "header longer than the file": (100).to_bytes(8, "little") + b"{}",
    "not JSON": packed(b"{nope"),
    "not UTF-8": packed(b'{"\xff\xfe": 1}'),
    "a list": packed([]),
    "nested a million deep": packed(b"[" * 1_000_000),
    "an endless number": packed(b'{"a": ' + b"9" * 10_000 + b"}"),
    "name twice": packed(b'{"a": 1, "a": 1}'),
    "entry is a number": packed({"a": 1}),
    "unknown dtype": packed({"a": tensor([1], 0, 4, "Q4")}, bytes(4)),
    "negative size": packed({"a": tensor([-1], 0, 4)}, bytes(4)),
    "size is true": packed({"a": tensor([True], 0, 4)}, bytes(4)),
    "size is 2^60": packed({"a": tensor([1 << 60], 0, 4)}, bytes(4)),
    "a thousand dimensions": packed({"a": tensor([1] * 1000, 0, 4)}, bytes(4)),
    "shape and bytes differ": packed({"a": tensor([2], 0, 4)}, bytes(4)),
    "offsets backwards": packed({"a": tensor([1], 4, 0)}, bytes(4)),
    "one offset": packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, bytes(4)),
    "hole": packed({"a": tensor([1], 0, 4), "b": tensor([1], 8, 12)}, bytes(12)),
    "overlap": packed({"a": tensor([2], 0, 8), "b": tensor([1], 4, 8)}, bytes(8)),
    "cut short": packed({"a": tensor([4], 0, 16)}, bytes(12)),
    "bytes left over": packed({"a": tensor([1], 0, 4)}, bytes(8)),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line(tmp_path: Path, lie: str) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(LIES[lie])
    with pytest.raises(CheckpointError, match="damaged") as caught:
        read_headers(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "last.ckpt"])
def test_pickle_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"\x80\x04.")
    assert has_weights(tmp_path)
    with pytest.raises(CheckpointError, match="pickle can execute code"):
        read_headers(tmp_path)


def test_nothing_and_no_folder(tmp_path: Path) -> None:
    assert not has_weights(tmp_path)
    with pytest.raises(CheckpointError, match="no weights"):
        read_headers(tmp_path)
    with pytest.raises(CheckpointError, match="Cannot read"):
        read_headers(tmp_path / "none")


def test_two_files_without_an_index(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(GOOD)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors\.index"):
        read_headers(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"one": "one.safetensors", "two": "three.safetensors"}, "missing"),
        ({"one": "../one.safetensors"}, "outside"),
        ({"one": "/etc/passwd"}, "outside"),
        ({"one": "sub\\..\\one.safetensors"}, "outside"),
        ({"one": "one\0.safetensors"}, "outside"),
        ({"one": "pytorch_model.bin"}, "only safetensors"),
        ({"one": "one.safetensors", "two": "one.safetensors"}, "does not hold it"),
        ({"one": "one.safetensors", "three": "two.safetensors"}, "does not hold it"),
        ({"one": 1}, "damaged"),
        ({}, "damaged"),
    ],
)
def test_an_index_that_lies(tmp_path: Path, weight_map: dict[str, Any], message: str) -> None:
    shards(tmp_path, weight_map)
    with pytest.raises(CheckpointError, match=message):
        read_headers(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', "[" * 100_000])
def test_an_index_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(CheckpointError, match="damaged"):
        read_headers(tmp_path)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.safetensors"


@settings(max_examples=100, deadline=None)
@given(length=st.integers(0, len(GOOD) - 1))
def test_every_truncation_is_refused(scratch: Path, length: int) -> None:
    scratch.write_bytes(GOOD[:length])
    with pytest.raises(CheckpointError):
        list(read_header(scratch))


@settings(max_examples=300, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, len(GOOD) - 1), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_flipped_bytes_never_crash(scratch: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(GOOD)
    for place, mask in flips:
        content[place] ^= mask
    scratch.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert all(entry.end <= len(content) for entry in read_header(scratch))
