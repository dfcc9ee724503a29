"""ModelSpec: what the arithmetic of memory needs to know of a model."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

# Which weights a quantizer may touch: the projections inside the layers. Embeddings and the output
# head keep their format, as bitsandbytes and torchao leave them.
Role = Literal["embedding", "head", "linear", "other"]


@dataclass(frozen=True)
class TensorSpec:
    """One weight of the checkpoint, or the same weight in `count` layers.

    `name` is the checkpoint's, with ``{}`` for the layer's number where `count` is more than one.
    `shape` is as stored: ``[out, in]`` for a linear weight.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    count: int = 1

    @property
    def elements(self) -> int:
        """Numbers in one such tensor."""
        product = 1
        for size in self.shape:
            product *= size
        return product


@dataclass(frozen=True)
class ModelSpec:
    """A dense decoder-only model's geometry. Sizes are counts of numbers, never bytes.

    `windows` holds one entry a layer: None for full attention, else the tokens that a sliding layer
    sees, its own included. `source` is where the weights are: a folder, a .gguf file, a hub id, or
    "" for a bare config or a catalog entry without weights.
    """

    name: str
    family: str  # config.json's model_type
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    max_context_tokens: int
    tie_embeddings: bool
    gated_mlp: bool
    dtype: str  # the checkpoint's: fp32, bf16 or fp16
    windows: tuple[int | None, ...]
    tensors: tuple[TensorSpec, ...]
    softcap: float | None = None  # of attention scores (Gemma 2)
    source: str = ""

    @property
    def parameters(self) -> int:
        """Numbers in all weights, tied ones once."""
        return sum(tensor.elements * tensor.count for tensor in self.tensors)

    @property
    def kv_width(self) -> int:
        """Numbers that one token adds to the KV cache of one layer: K and V of every KV head."""
        return 2 * self.num_kv_heads * self.head_dim

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` gives the same spec back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelSpec":
        """The spec that `to_json` wrote."""
        tensors = tuple(
            TensorSpec(**{**tensor, "shape": tuple(tensor["shape"])}) for tensor in data["tensors"]
        )
        return cls(**{**data, "windows": tuple(data["windows"]), "tensors": tensors})
