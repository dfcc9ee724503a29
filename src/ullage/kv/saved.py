"""Sequences in files, and back: a layer at a time. What the files are is in
`ullage.specs.saved`."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ullage.errors import InputError
from ullage.kv.cache import PagedCache, Sequence
from ullage.specs.safetensors import StoredTensor
from ullage.specs.saved import FORMAT, Record, SavedText
from ullage.specs.whole import whole

_DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn, "I32": torch.int32, "BOOL": torch.bool,
}  # fmt: skip
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_UNKNOWN_SHA256 = "0" * 64


def write(path: Path, record: Record, sequence: Sequence) -> None:
    """Write a file, whole or not at all.

    Raises:
        TechniqueError: rows that are not saved.
        OSError: it cannot be written.
    """
    with whole(path) as file:
        file.write(_header(record, sequence, _UNKNOWN_SHA256))
        digest = record.digest()
        for name, tensor in _tensors(sequence):
            content = _bytes_of(tensor.cpu().contiguous())
            digest.update(name.encode())
            digest.update(content)
            file.write(content)
        file.seek(0)
        file.write(_header(record, sequence, digest.hexdigest()))


@dataclass(frozen=True)
class FromFile:
    """A saved sequence as a `Start`: it is read from its file each time that a sequence begins."""

    saved: SavedText

    @property
    def length(self) -> int:
        """Tokens seen."""
        return self.saved.record.tokens

    def opened(self, cache: PagedCache, tokens: int) -> Sequence:
        """See `Start`.

        Raises:
            InputError: the file is damaged, or of another model, setting or format than the cache.
        """
        sequence = cache.open(tokens)
        try:
            digest = self.saved.record.digest()
            with self.saved.path.open("rb", buffering=0) as file:
                self._restore(sequence, file, digest)
            if digest.hexdigest() != self.saved.sha256:
                raise InputError(f"{self.saved.path} is damaged: read the text again.")
        except BaseException:
            sequence.close()
            raise
        return sequence

    def _restore(self, sequence: Sequence, file: BinaryIO, digest: "hashlib._Hash") -> None:
        for layer, row in enumerate(sequence.rows):
            stored = self.saved.of_layer(layer).items()
            state = {name: _read(file, one, digest) for name, one in stored}
            try:
                row.restore(state, self.length)
            except InputError as error:
                raise self.saved.unfit(str(error)) from error


def _tensors(sequence: Sequence) -> Iterator[tuple[str, torch.Tensor]]:
    for layer, row in enumerate(sequence.rows):
        for name, tensor in row.state().items():
            yield f"{layer}.{name}", tensor


def _header(record: Record, sequence: Sequence, sha256: str) -> bytes:
    """As the format asks, its length first; `sha256` changes no length."""
    metadata = {"format": FORMAT, "record": json.dumps(asdict(record)), "sha256": sha256}
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for name, tensor in _tensors(sequence):
        place = [at, at + tensor.nbytes]
        header[name] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": place
        }  # fmt: skip
        at = place[1]
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """Where the tensor's bytes lie: contiguous, on the host."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def _read(file: BinaryIO, stored: StoredTensor, digest: "hashlib._Hash") -> torch.Tensor:
    """The tensor, read and not mapped."""
    dtype = _DTYPES.get(stored.dtype)
    if dtype is None:
        raise InputError(f"{stored.file} is damaged: {stored.name[:80]} is {stored.dtype}.")
    tensor = torch.empty(stored.shape, dtype=dtype)
    view = _bytes_of(tensor)
    file.seek(stored.begin)
    done = 0
    while done < len(view):
        count = file.readinto(view[done:])  # type: ignore[attr-defined]
        if not count:
            raise InputError(f"{stored.file} is cut short: read the text again.")
        done += count
    digest.update(stored.name.encode())
    digest.update(view)
    return tensor
