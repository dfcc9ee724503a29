"""A file with what a model holds of a text that it read, a bank in each layer: what the file says
of itself, checked without torch. It is a safetensors file, tensor `NAME` of layer 3 `3.NAME`."""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from ullage.errors import CheckpointError, InputError
from ullage.specs.decode import decode
from ullage.specs.model import ModelSpec
from ullage.specs.safetensors import StoredTensor, read_header, read_metadata

FORMAT = "ullage-bank-2"
_WRITES_ONE = "`ullage read MODEL DOC --save FILE` writes one."


@dataclass(frozen=True)
class Record:
    """Which model read which text, and how. `fingerprint`: of the model's weights. `rotation`: how
    it turns queries and keys, in JSON. `technique`: as it is typed. `max_tokens`: of a sequence, by
    the rotary frequencies that it was read with, None for any number. `document`: a name;
    `document_sha256` is of its text in UTF-8."""

    model: str
    layers: int
    kv_heads: int
    head_dim: int
    fingerprint: str
    rotation: str
    technique: str
    kv_dtype: str
    tokens: int
    max_tokens: int | None
    document: str
    document_sha256: str

    def unsuited(self, model: ModelSpec) -> str | None:
        """Why it is not for `model`, as far as shapes say; None when they agree."""
        mine = (self.layers, self.kv_heads, self.head_dim)
        shape = (model.num_layers, model.num_kv_heads, model.head_dim)
        if mine == shape:
            return None
        return (
            "it is of {}, a model of {} layers, {} KV heads and head size {}; {} has {}, {} and {}."
        ).format(self.model, *mine, model.name, *shape)

    def digest(self) -> "hashlib._Hash":
        """SHA-256 of the record, to go on with each tensor's name and bytes."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode())


@dataclass(frozen=True)
class SavedText:
    """A file, its record, and where its tensors lie, layer by layer; `sha256` of all of them."""

    path: Path
    record: Record
    sha256: str
    tensors: tuple[StoredTensor, ...]

    def of_layer(self, layer: int) -> dict[str, StoredTensor]:
        """Its tensors by their names in the layer, in the order of their bytes."""
        start = f"{layer}."
        own = (tensor for tensor in self.tensors if tensor.name.startswith(start))
        return {tensor.name.removeprefix(start): tensor for tensor in own}

    def unfit(self, reason: str) -> InputError:
        """Why nothing can begin with it, and what to do."""
        return InputError(
            f"{self.path} cannot be gone on from: {reason} Run what it was read with, or read the "
            "text again."
        )


def read_saved(path: Path) -> SavedText:
    """What the file at `path` says of itself; its tensors are left alone.

    Raises:
        InputError: no such file, none that ullage saved, one of another format version, or one
            that is damaged or cut short.
    """
    try:
        metadata, tensors = read_metadata(path), tuple(read_header(path))
    except CheckpointError as error:
        again = "Read the text again: " if path.is_file() else ""
        raise InputError(f"No bank can be read. {error} {again}{_WRITES_ONE}") from error
    found = metadata.get("format")
    if found != FORMAT:
        raise InputError(_other_format(path, found))
    try:
        record = decode(Record, json.loads(metadata["record"]), "record")
        sha256 = metadata["sha256"]
    except (KeyError, ValueError, RecursionError, InputError) as error:
        raise InputError(f"{path} is damaged: {error} Read the text again.") from error
    if not record.tokens:
        raise InputError(f"{path} is damaged: it is of no token. Read the text again.")
    return SavedText(path, record, sha256, tensors)


def _other_format(path: Path, found: str | None) -> str:
    if found is not None and found.startswith(FORMAT.rstrip("0123456789")):
        return f"{path} is of format {found[:40]}; this ullage reads {FORMAT}. Read the text again."
    return f"{path} is no bank: {_WRITES_ONE}"
