"""Read the header of a GGUF file, version 2 or 3.

Only the header is read, in place, and everything that it says is checked against the file before it
is believed: a file that lies costs an error, not memory or time. The format is described at
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

import mmap
import re
import struct
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from ullage.errors import CheckpointError

_MOST_ENTRIES = 65_536  # metadata keys, and tensors
_MOST_STRING_BYTES = 16 << 20
_MOST_HEADER_BYTES = 64 << 20  # the largest vocabularies take 15 MB
_MOST_KEPT = 64  # longer arrays are token lists
_MOST_ELEMENTS = 1 << 48
_ALIGNMENTS = {1 << power for power in range(3, 17)}
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MOST_SHARDS = 1000
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_LENGTH = struct.Struct("<Q")

# Number: name, numbers in a block, bytes of a block.
_TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 40),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66),
    17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50),
    20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2),
    34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip

BLOCKS = {name: (numbers, nbytes) for name, numbers, nbytes in _TYPES.values()}
"""By type: how many numbers a block holds, in how many bytes."""


class SkippedArray(NamedTuple):
    """Stands in the metadata for an array too long to keep."""

    length: int


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor of the file. `shape` is ``[out, in]`` as in torch, `offset` counts bytes from the
    start of the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """All that a GGUF file says of itself before its data."""

    version: int
    metadata: dict[str, Any]
    tensors: tuple[GGUFTensor, ...]


def read_header(path: Path) -> GGUFHeader:
    """The header of the GGUF file at `path`.

    Raises:
        CheckpointError: unreadable, not GGUF, or something in it cannot be true.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"No GGUF file at {path}.")
        file_bytes = path.stat().st_size
        if file_bytes < 24:
            raise CheckpointError(f"{path} is damaged: {file_bytes} bytes are no GGUF file.")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(path, data).header()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error


def read_parts(path: Path) -> GGUFHeader:
    """The header of the GGUF file at `path`, with the tensors of the parts that follow it.

    Raises:
        CheckpointError: one of them is missing or damaged, or it is not the first.
    """
    header = read_header(path)
    count = header.metadata.get("split.count")
    if type(count) is not int or count < 2:
        return header
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found["number"]) != 1 or not int(found["count"]) == count:
        raise CheckpointError(f"{path} is one of {count} parts: name the first, -00001-of-…")
    if count > _MOST_SHARDS:
        raise CheckpointError(f"{path} is damaged: it is one of {count} parts.")
    tensors = list(header.tensors)
    for number in range(2, count + 1):
        name = f"{found['stem']}-{number:05}-of-{found['count']}.gguf"
        tensors += read_header(path.with_name(name)).tensors
    if len({tensor.name for tensor in tensors}) < len(tensors):
        raise CheckpointError(f"{path} and the parts that follow it hold a tensor twice.")
    return replace(header, tensors=tuple(tensors))


class _Reader:
    """A place in the header that only moves on over what is really there."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self._path, self._data = path, data
        self._end = min(len(data), _MOST_HEADER_BYTES)
        self._at = 0

    def header(self) -> GGUFHeader:
        if self._take(4) != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        version = self._number("<I")
        if version not in (2, 3):
            raise self._damaged(f"version {version} is not 2 or 3")
        tensor_count, key_count = self._count("tensors"), self._count("metadata keys")
        metadata = self._metadata(key_count)
        raw_tensors = [self._tensor() for _ in range(tensor_count)]
        return GGUFHeader(version, metadata, self._placed(raw_tensors, metadata))

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self._path} is damaged: {what}.")

    def _take(self, size: int) -> bytes:
        start = self._skip(size)
        return self._data[start : self._at]

    def _skip(self, size: int) -> int:
        """Move on by `size` bytes; where they began."""
        start = self._at
        if size > self._end - start:
            raise self._damaged(f"{size} bytes at {start} reach past the end of its header")
        self._at = start + size
        return start

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _count(self, what: str) -> int:
        count: int = self._number("<Q")
        if count > _MOST_ENTRIES:
            raise self._damaged(f"{count} {what} are more than {_MOST_ENTRIES}")
        return count

    def _string(self) -> str:
        length: int = self._number("<Q")
        if length > _MOST_STRING_BYTES:
            raise self._damaged(f"a string of {length} bytes")
        return self._take(length).decode("utf-8", errors="replace")

    def _metadata(self, count: int) -> dict[str, Any]:
        metadata: dict[str, Any] = {}
        for _ in range(count):
            key = self._string()
            if key in metadata:
                raise self._damaged(f"the key {key[:80]!r} is there twice")
            metadata[key] = self._value(self._number("<I"))
        return metadata

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            return self._array()
        if kind not in _SCALARS:
            raise self._damaged(f"{kind} is no type of a value")
        return self._number(_SCALARS[kind])

    def _array(self) -> Any:
        kind, length = self._number("<I"), self._number("<Q")
        if kind == _ARRAY:
            raise self._damaged("an array of arrays")
        if length <= _MOST_KEPT:
            return [self._value(kind) for _ in range(length)]
        if kind == _STRING:
            self._skip_strings(length)
        elif kind in _SCALARS:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        else:
            raise self._damaged(f"{kind} is no type of a value")
        return SkippedArray(length)

    def _skip_strings(self, count: int) -> None:
        # The one loop that runs a quarter of a million times: everything in locals.
        at, last, data, unpack = self._at, self._end - 8, self._data, _LENGTH.unpack_from
        if count > (self._end - at) // 8:
            raise self._damaged(f"{count} strings reach past the end of its header")
        for _ in range(count):
            if at > last:
                raise self._damaged("a list of strings reaches past the end of its header")
            at += 8 + unpack(data, at)[0]
        if at > self._end:
            raise self._damaged("a list of strings reaches past the end of its header")
        self._at = at

    def _tensor(self) -> GGUFTensor:
        """A tensor whose `offset` still counts from the start of the data."""
        name = self._string()
        num_dims = self._number("<I")
        if not 1 <= num_dims <= 4:
            raise self._damaged(f"{name[:80]!r} has {num_dims} dimensions")
        dims = [self._number("<Q") for _ in range(num_dims)]
        kind, offset = self._number("<I"), self._number("<Q")
        if kind not in _TYPES:
            raise self._damaged(f"{name[:80]!r} has the unknown type {kind}")
        type_name, block, block_bytes = _TYPES[kind]
        elements = 1
        for size in dims:
            elements *= size
        if not 0 < elements <= _MOST_ELEMENTS or dims[0] % block:
            raise self._damaged(f"{name[:80]!r} has the shape {dims} of {type_name}")
        nbytes = elements // block * block_bytes
        return GGUFTensor(name, tuple(reversed(dims)), type_name, offset, nbytes)

    def _placed(
        self, tensors: list[GGUFTensor], metadata: dict[str, Any]
    ) -> tuple[GGUFTensor, ...]:
        """The tensors at their places in the file, where each has room of its own."""
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment not in _ALIGNMENTS:
            raise self._damaged(f"an alignment of {str(alignment)[:40]}")
        if len({tensor.name for tensor in tensors}) < len(tensors):
            raise self._damaged("two tensors have one name")
        start = -(-self._at // alignment) * alignment
        placed = [replace(tensor, offset=start + tensor.offset) for tensor in tensors]
        in_order = sorted(placed, key=lambda tensor: tensor.offset)
        for tensor in in_order:
            if tensor.offset % alignment or tensor.offset + tensor.nbytes > len(self._data):
                raise self._damaged(f"the data of {tensor.name[:80]!r} is not in the file")
        for first, second in pairwise(in_order):
            if first.offset + first.nbytes > second.offset:
                raise self._damaged(f"{first.name[:80]!r} and {second.name[:80]!r} overlap")
        return tuple(placed)
