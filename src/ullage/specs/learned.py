"""Files of what was learned about a model: safetensors with a format and a hash over the numbers.
Those of a technique lie on a shelf: some are shipped, any other goes by its path. No torch."""

import hashlib
import os
from collections.abc import Callable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ullage.errors import TechniqueError
from ullage.specs.whole import write_whole

Learned = TypeVar("Learned")


class Shelf(Generic[Learned]):
    """The files of one `format`, of which those in `folder` are shipped, by the names of their
    models. `what` a file holds is for errors. `parse` makes of a file's metadata and of
    the open file what is learned, and raises KeyError or ValueError where it cannot."""

    def __init__(
        self,
        technique: str,
        what: str,
        format: str,
        folder: Path,
        limit_bytes: int,
        parse: Callable[[dict[str, str], Any], Learned],
    ) -> None:
        self.technique, self.what, self.format = technique, what, format
        self.folder, self.limit_bytes = folder, limit_bytes
        self._read: Callable[..., Learned] = lru_cache(maxsize=16)(self._read_as_it_is)
        self._parse = parse

    def names(self) -> list[str]:
        """Those that are shipped."""
        return sorted(file.stem for file in self.folder.glob("*.safetensors"))

    def known(self) -> str:
        """Their names, to be told."""
        return ", ".join(self.names()) or "none yet"

    def load(self, name: str) -> Learned:
        """What is shipped as `name`, or the file of that path, as it is now. Planning asks often: a
        file that has not changed is read once.

        Raises:
            TechniqueError: there is none, or it is damaged.
        """
        path = os.path.join(self.folder, f"{name}.safetensors")
        try:
            if not os.path.isfile(path):
                path = name
            if not os.path.isfile(path):
                raise TechniqueError(
                    f"{self.technique}: no {self.what} {name!r}: neither a file nor one of those "
                    f"that are shipped: {self.known()}."
                )
            state = os.stat(path)
            if state.st_size > self.limit_bytes:
                raise TechniqueError(f"{self.technique}: {name} is too large for an {self.what}.")
            # whoever writes one in place of another, as `save` does, writes another file
            return self._read(path, state.st_dev, state.st_ino, state.st_mtime_ns, state.st_size)
        except (SafetensorError, KeyError, ValueError, RecursionError, OSError) as error:
            raise TechniqueError(
                f"{self.technique}: {name} is not an {self.what}, or damaged: {error}"
            ) from None

    def save(
        self, path: Path, tensors: Mapping[str, numpy.ndarray], metadata: Mapping[str, str]
    ) -> None:
        """Write a file, whole or not at all."""
        numbers = dict(tensors)
        whole = {"format": self.format, **metadata, "sha256": tensors_sha256(save(numbers))}
        write_whole(path, save(numbers, whole))

    def _read_as_it_is(self, path: str, *_: int) -> Learned:
        with safe_open(path, "numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != self.format:
                raise ValueError(f"its format is {metadata.get('format')!r}, not {self.format!r}")
            if metadata["sha256"] != tensors_sha256(Path(path).read_bytes()):
                raise ValueError("its numbers are not those that were saved")
            return self._parse(metadata, file)


def tensor(file: Any, name: str, kind: str) -> numpy.ndarray:
    """A tensor of an open file, in the format of a safetensors header that it is to have: there
    are some that numpy does not know.

    Raises:
        ValueError: it has another.
    """
    found = file.get_slice(name).get_dtype()
    if found != kind:
        raise ValueError(f"{name} is in {found}, not in {kind}")
    return file.get_tensor(name)  # type: ignore[no-any-return]


def tensors_sha256(content: bytes) -> str:
    """Hex SHA-256 over the tensors' bytes in the `content` of a .safetensors file."""
    header_bytes = int.from_bytes(content[:8], "little")
    return hashlib.sha256(memoryview(content)[8 + header_bytes :]).hexdigest()


def saved_state(technique: str, path: Path, training: str) -> dict[str, Any]:
    """The tensors, in torch, that a training left in `path` to go on from. `training` tells it from
    others: the file's metadata has it.

    Raises:
        TechniqueError: the file is of another training, or damaged.
    """
    try:
        with safe_open(path, "pt") as opened:
            if (opened.metadata() or {}).get("training") == training:
                return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise TechniqueError(
            f"{technique}: {path}, which training would go on from, is damaged: {error}. Remove it "
            "to begin anew."
        ) from None
    raise TechniqueError(
        f"{technique}: {path} is of a training with other settings or texts: ask for the same, or "
        "remove it to begin anew."
    )
