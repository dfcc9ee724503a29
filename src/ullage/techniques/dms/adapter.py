"""An adapter: how far back each KV head of one model has to look, as it was measured, and what it
has learned to read off hidden states. No torch."""

import json
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy
from safetensors import SafetensorError, safe_open

from ullage.specs.blocks import full_layer_numbers
from ullage.specs.learned import Shelf, tensor
from ullage.specs.model import ModelSpec

LIMIT_BYTES = 64 << 20  # a byte a head and hidden number for each predictor: 70B models take 12 MB
LEARNED = ("linear", "dms")
DECIDED_TOKENS = 64  # at once
# What is measured, in tokens; in a text up to half its length.
WINDOWS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
           16384, 24576, 32768)  # fmt: skip
CAPPED = "dms: a model that caps its attention scores cannot be measured yet, nor trained."


@dataclass(frozen=True, eq=False)
class Adapter:
    """What a model's predictions lose where a head sees a shorter window, and what tells which
    entries beyond it they will miss.

    `windows`: [J], in tokens, rising. `loss`: [L, Hkv, J], the KL divergence to full attention, in
    nats a token, where that head alone does; L counts the layers that keep every token.
    `captured`: [L, Hkv, DECIDED_TOKENS], rising to 1, the part of it that the linear predictor's
    first 1, 2, ... of as many entries make up.
    `fingerprint`: of the model's norms. `record`: how it was measured. `predictors`: [L, Hkv, E] by
    name; the product with the hidden state that an entry is computed from ranks it among others.
    """

    windows: tuple[int, ...]
    loss: numpy.ndarray
    captured: numpy.ndarray
    head_dim: int
    fingerprint: str
    record: dict[str, Any]
    predictors: dict[str, numpy.ndarray] = field(default_factory=dict)

    def unsuited(self, model: ModelSpec) -> str | None:
        """Why it is not for `model`, as far as shapes say; None when they agree."""
        shape = (len(full_layer_numbers(model)), model.num_kv_heads, model.head_dim)
        mine = (*self.loss.shape[:2], self.head_dim)
        if shape == mine and self._hidden_sizes <= {model.hidden_size}:
            return None
        if shape == mine:
            return f"the adapter is for another hidden size than its {model.hidden_size}."
        return (
            "the adapter is for a model of {} layers, {} KV heads and head size {}, and this has "
            "{}, {} and {}."
        ).format(*mine, *shape)

    @property
    def _hidden_sizes(self) -> set[int]:
        return {weights.shape[2] for weights in self.predictors.values()}

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        metadata = {
            "head_dim": str(self.head_dim),
            "fingerprint": self.fingerprint,
            "record": json.dumps(self.record),
        }
        tensors = {
            "windows": numpy.array(self.windows, dtype=numpy.int32),
            "loss": self.loss.astype(numpy.float32),
            "captured": self.captured.astype(numpy.float32),
        }
        for name, weights in self.predictors.items():
            tensors[name], tensors[f"{name}.scales"] = _quantized(weights)
        ADAPTERS.save(path, tensors, metadata)


def holds_trained(path: Path) -> bool:
    """Whether the file at `path` has a trained predictor, of whatever format and however damaged
    the rest is."""
    try:
        with safe_open(path, "numpy") as file:
            return "dms" in file.keys()  # noqa: SIM118
    except (SafetensorError, OSError):
        return False


def _quantized(weights: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
    """In int8, and a scale for each head: it is the order of products that counts."""
    scales = numpy.abs(weights).max(-1, keepdims=True) / 127
    safe = numpy.where(scales > 0, scales, 1)
    return numpy.rint(weights / safe).astype(numpy.int8), scales[..., 0].astype(numpy.float32)


def _predictor(name: str, shape: tuple[int, ...], file: Any) -> numpy.ndarray:
    numbers, scales = tensor(file, name, "I8"), tensor(file, f"{name}.scales", "F32")
    if numbers.ndim != 3 or numbers.shape[:2] != shape:
        raise ValueError(f"{name} is no predictor of its heads")
    if scales.shape != shape or not numpy.isfinite(scales).all():
        raise ValueError(f"{name} has no scale for each head")
    return numbers * scales[..., None]  # type: ignore[no-any-return]


def _captured(shape: tuple[int, ...], file: Any) -> numpy.ndarray:
    captured = tensor(file, "captured", "F32")
    if captured.ndim != 3 or captured.shape[:2] != shape or captured.shape[2] != DECIDED_TOKENS:
        raise ValueError("it does not say what survivors catch")
    if not (numpy.isfinite(captured).all() and (captured >= 0).all() and (captured <= 1).all()):
        raise ValueError("survivors catch more than there is, or less than nothing")
    return captured


def _parsed(metadata: dict[str, str], file: Any) -> Adapter:
    sizes, loss = tensor(file, "windows", "I32"), tensor(file, "loss", "F32")
    windows = tuple(map(int, sizes.reshape(-1)))
    if (
        sizes.ndim != 1
        or not windows
        or loss.ndim != 3
        or loss.shape[2] != len(windows)
        or list(windows) != sorted(set(windows))
    ):
        raise ValueError("windows and losses do not go together")
    if windows[0] < 1 or not numpy.isfinite(loss).all():
        raise ValueError("it holds what no measurement gives")
    record = json.loads(metadata["record"])
    if not isinstance(record, dict):
        raise ValueError("it does not say how it was measured")
    held = set(file.keys())
    return Adapter(
        windows,
        loss,
        _captured(loss.shape[:2], file),
        int(metadata["head_dim"]),
        metadata["fingerprint"],
        record,
        {name: _predictor(name, loss.shape[:2], file) for name in LEARNED if name in held},
    )


ADAPTERS = Shelf(
    "dms", "adapter of DMS", "ullage-dms-3", Path(str(files(__package__))) / "adapters",
    LIMIT_BYTES, _parsed,
)  # fmt: skip
