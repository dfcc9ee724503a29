"""Read the headers of safetensors files: what is stored where, without reading any weight.

The format is described at https://huggingface.co/docs/safetensors. All that a header says is
checked against the file, and a pickle is never opened.
"""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from ullage.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_METADATA = "__metadata__"
_SINGLE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_MOST_HEADER_BYTES = 100 * 10**6
_MOST_DIMS = 16
_CHUNK_BYTES = 1 << 20
_LARGEST = 1 << 48

_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file: its raw `dtype` (``BF16``) and the bytes `begin`..`end` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    begin: int
    end: int


def has_weights(folder: Path) -> bool:
    """Whether `read_headers` has anything to say of `folder`, be it an error."""
    return any(file.suffix in (".safetensors", *_PICKLES) for file in _listed(folder))


def read_headers(folder: Path) -> list[StoredTensor]:
    """Every tensor of the checkpoint in `folder`: ``model.safetensors``, or the shards that
    ``model.safetensors.index.json`` names, or the only .safetensors file there is.

    Raises:
        CheckpointError: no safetensors, only a pickle, or a file that is damaged or missing.
    """
    index = folder / INDEX
    if (folder / _SINGLE).is_file() or not index.is_file():
        return list(read_header(_only_file(folder)))
    weight_map = _weight_map(index)
    stored = [
        tensor
        for shard in sorted(set(weight_map.values()))
        for tensor in read_header(_shard(folder, shard))
    ]
    places = {tensor.name: tensor.file for tensor in stored}
    for name, shard in weight_map.items():
        if places.get(name) != folder / shard:
            raise CheckpointError(
                f"{index} places {name[:200]} in {shard}, which does not hold it."
            )
    if len(stored) != len(weight_map):
        raise CheckpointError(f"The shards in {folder} hold tensors that {INDEX} does not name.")
    return stored


def read_header(file: Path) -> Iterator[StoredTensor]:
    """The tensors of one .safetensors file, in the order of their data.

    Raises:
        CheckpointError: unreadable, cut short, or something in the header cannot be true.
    """
    header, start, data_bytes = _read_json(file)
    header.pop(_METADATA, None)
    entries = [_entry(file, name, entry) for name, entry in header.items()]
    at = 0
    for name, dtype, shape, begin, end in sorted(entries, key=lambda entry: entry[3:]):
        if begin != at or end > data_bytes:
            raise _damaged(file, f"the data of {name[:80]!r} has a hole, an overlap or no end")
        at = end
        yield StoredTensor(name, dtype, shape, file, start + begin, start + end)
    if at != data_bytes:
        raise _damaged(file, f"{data_bytes - at} bytes at its end belong to no tensor")


def read_metadata(file: Path) -> dict[str, str]:
    """What one .safetensors file says beside its tensors.

    Raises:
        CheckpointError: unreadable, cut short, or no map of texts.
    """
    metadata = _read_json(file)[0].get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise _damaged(file, "its metadata are no texts by name")
    return metadata


def same_data(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal in format, shape and every byte.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    try:
        with one.file.open("rb") as left, other.file.open("rb") as right:
            left.seek(one.begin)
            right.seek(other.begin)
            for at in range(one.begin, one.end, _CHUNK_BYTES):
                count = min(_CHUNK_BYTES, one.end - at)
                if left.read(count) != right.read(count):
                    return False
    except OSError as error:
        raise CheckpointError(f"Cannot read {error.filename}: {error.strerror}.") from error
    return True


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise CheckpointError(f"Cannot read {folder}: {error.strerror}.") from error


def _only_file(folder: Path) -> Path:
    found = [file for file in _listed(folder) if file.suffix == ".safetensors"]
    single = folder / _SINGLE
    if single in found or len(found) == 1:
        return single if single in found else found[0]
    if found:
        raise CheckpointError(f"{folder} holds {len(found)} .safetensors files and no {INDEX}.")
    pickles = [file.name for file in _listed(folder) if file.suffix in _PICKLES]
    if pickles:
        raise CheckpointError(
            f"{folder / pickles[0]} is refused: pickle can execute code; safetensors or GGUF only."
        )
    raise CheckpointError(f"{folder} holds no weights: a .safetensors file is needed.")


def _weight_map(index: Path) -> dict[str, str]:
    try:
        if index.stat().st_size > _MOST_HEADER_BYTES:
            raise CheckpointError(f"{index} is larger than 100 MB.")
        weight_map = json.loads(index.read_bytes())["weight_map"]
    except OSError as error:
        raise CheckpointError(f"Cannot read {index}: {error.strerror}.") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise CheckpointError(f"{index} is damaged: it holds no weight_map.") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} is damaged: its weight_map is no list of files.")
    if not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{index} is damaged: its weight_map holds more than file names.")
    return weight_map


def _shard(folder: Path, name: str) -> Path:
    """The file of a shard, which may not lie outside of `folder`."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or ":" in name:
        raise CheckpointError(
            f"{folder / INDEX} names {name[:200]!r}, outside of its folder: refused."
        )
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{folder / INDEX} names {name[:200]!r}: only safetensors is read.")
    if not (folder / path).is_file():
        raise CheckpointError(
            f"{folder / INDEX} names {name[:200]}, which is missing: download it."
        )
    return folder / path


def _read_json(file: Path) -> tuple[dict[str, Any], int, int]:
    """The header, where the data starts, and how many bytes of data there are."""
    try:
        with file.open("rb") as stream:
            file_bytes = os.fstat(stream.fileno()).st_size
            header_bytes = int.from_bytes(stream.read(8), "little")
            if header_bytes > min(_MOST_HEADER_BYTES, file_bytes - 8):
                raise _damaged(file, f"a header of {header_bytes} bytes in {file_bytes}")
            text = stream.read(header_bytes)
    except OSError as error:
        raise CheckpointError(f"Cannot read {file}: {error.strerror}.") from error
    try:
        header = json.loads(text, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise _damaged(file, f"its header is not JSON ({str(error)[:80]})") from error
    if not isinstance(header, dict):
        raise _damaged(file, "its header is no JSON object")
    return header, 8 + header_bytes, file_bytes - 8 - header_bytes


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name is there twice")
    return dict(pairs)


def _entry(file: Path, name: str, entry: Any) -> tuple[str, str, tuple[int, ...], int, int]:
    fields = entry if isinstance(entry, dict) else {}
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise _damaged(file, f"{name[:80]!r} has the unknown dtype {str(dtype)[:40]}")
    shape, place = _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if shape is None or place is None or len(place) != 2:
        raise _damaged(file, f"{name[:80]!r} has no shape or no place")
    begin, end = place
    bits = _BITS[dtype]
    for size in shape:
        bits *= size
    if bits != 8 * (end - begin):
        raise _damaged(file, f"{name[:80]!r} has {end - begin} bytes for {dtype} {list(shape)}")
    return name, dtype, shape, begin, end


def _sizes(value: Any) -> tuple[int, ...] | None:
    """A short list of sizes as a tuple, or None when it is none."""
    if not isinstance(value, list) or len(value) > _MOST_DIMS:
        return None
    if not all(type(size) is int and 0 <= size <= _LARGEST for size in value):
        return None
    return tuple(value)


def _damaged(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{file} is damaged: {what}.")
