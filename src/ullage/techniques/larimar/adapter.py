"""An adapter: what the KV entries of facts have in common in one model, so that little has to be
kept of each. No torch."""

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy

from ullage.specs.learned import Shelf, tensor
from ullage.specs.model import ModelSpec

LIMIT_BYTES = 10 << 20


@dataclass(frozen=True, eq=False)
class Adapter:
    """An entry is of all layers: keys, without their rotary position, and values, [2, L, Hkv, D].

    `mean`: [2, L, Hkv, D], and `scale`: [2, L], by which entries are centred and divided. `basis`:
    [C, 2, L, Hkv, D]: products with it are an entry's latent, and the sum of its rows, each by
    its number of the latent, is the entry again. `fingerprint`: of the model's norms. `record`:
    how it was trained.
    """

    mean: numpy.ndarray
    scale: numpy.ndarray
    basis: numpy.ndarray
    fingerprint: str
    record: dict[str, Any]

    @property
    def nbytes(self) -> int:
        """As it is computed with, in fp32."""
        return 4 * (self.mean.size + self.scale.size + self.basis.size)

    def unsuited(self, model: ModelSpec) -> str | None:
        """Why it is not for `model`, as far as shapes say; None when they agree."""
        shape = (model.num_layers, model.num_kv_heads, model.head_dim)
        if self.mean.shape[1:] == shape:
            return None
        return (
            "the adapter is for a model of {} layers, {} KV heads and head size {}, and this has "
            "{}, {} and {}."
        ).format(*self.mean.shape[1:], *shape)

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        tensors: dict[str, numpy.ndarray] = {
            "mean": self.mean.astype(numpy.float16),
            "scale": self.scale.astype(numpy.float32),
            "basis": self.basis.astype(numpy.float16),
        }
        metadata = {"fingerprint": self.fingerprint, "record": json.dumps(self.record)}
        ADAPTERS.save(path, tensors, metadata)


def _parsed(metadata: dict[str, str], file: Any) -> Adapter:
    mean, scale = tensor(file, "mean", "F16"), tensor(file, "scale", "F32")
    basis = tensor(file, "basis", "F16")
    if mean.ndim != 4 or basis.shape[1:] != mean.shape or scale.shape != mean.shape[:2]:
        raise ValueError("its tensors do not go together")
    if mean.shape[0] != 2 or not basis.size:
        raise ValueError("it holds no keys and values")
    if not all(numpy.isfinite(numbers).all() for numbers in (mean, scale, basis)):
        raise ValueError("it holds what is no number")
    if not (scale > 0).all():
        raise ValueError("its scales are not positive")
    record = json.loads(metadata["record"])
    if not isinstance(record, dict):
        raise ValueError("it does not say how it was trained")
    return Adapter(mean, scale, basis, metadata["fingerprint"], record)


ADAPTERS = Shelf(
    "larimar", "adapter of Larimar", "ullage-larimar-1", Path(str(files(__package__))) / "adapters",
    LIMIT_BYTES, _parsed,
)  # fmt: skip
