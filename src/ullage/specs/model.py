"""ModelSpec: what the arithmetic of memory needs to know of a model."""

from collections import Counter
from dataclasses import asdict, dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any, Literal

from ullage.errors import UnknownArchitecture
from ullage.specs.decode import decode
from ullage.specs.dtypes import DTYPE_BYTES

# Which weights a quantizer may touch: the projections inside the layers ("linear"), experts' too
# ("expert"). Embeddings and the output head keep their format, as bitsandbytes and
# torchao leave them.
Role = Literal["embedding", "head", "linear", "expert", "other"]


@dataclass(frozen=True)
class Storage:
    """How a quantized checkpoint stores a weight: `bits` a number, `group_bytes` of scales and
    zeros for each group of `group_rows` x `group_columns` numbers, and `column_bytes` for each
    column. A group of 0 spans that side."""

    name: str
    bits: float
    group_rows: int = 0
    group_columns: int = 0
    group_bytes: float = 0.0
    column_bytes: float = 0.0

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one weight ``[..., out, in]`` with its side data."""
        *stack, rows, columns = (1, *shape) if len(shape) == 1 else shape
        groups = ceil(rows / (self.group_rows or rows)) * ceil(
            columns / (self.group_columns or columns)
        )
        beside = groups * self.group_bytes + columns * self.column_bytes
        return prod(stack) * ceil(rows * columns * self.bits / 8 + beside)


@dataclass(frozen=True)
class TensorSpec:
    """One weight of the checkpoint, or the same weight in all of `layers`.

    `name` is the published checkpoint's, with ``{}`` for the layer's number where there are
    `layers`, and one more for the expert's where a layer holds `copies` in tensors of their own;
    without the second the copies are stacked in one tensor ``[copies, *shape]``. `shape` is that of
    one copy as stored: ``[out, in]`` for a linear weight. A token goes through `active` of the
    copies, None for all. `storage` is that of a quantized checkpoint, None for the model's own
    dtype.
    """

    name: str
    shape: tuple[int, ...]
    role: Role
    layers: tuple[int, ...] = ()
    copies: int = 1
    active: int | None = None
    storage: Storage | None = None

    @property
    def count(self) -> int:
        """How many there are, over layers and copies."""
        return max(1, len(self.layers)) * self.copies

    @property
    def elements(self) -> int:
        """Numbers in one such tensor."""
        return prod(self.shape)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The shape of the tensor in the file, all copies where they are stacked in it."""
        stacked = self.copies > 1 and self.name.count("{}") < 2
        return (self.copies, *self.shape) if stacked else self.shape

    def names(self) -> list[str]:
        """The name of each tensor in the file."""
        if not self.layers:
            return [self.name]
        named = [self.name.replace("{}", str(layer), 1) for layer in self.layers]
        if "{}" not in named[0]:
            return named
        return [name.replace("{}", str(n), 1) for name in named for n in range(self.copies)]

    def stored_bytes(self, dtype: str) -> int:
        """Bytes of one such tensor in its storage, `dtype` where it has none."""
        if self.storage is None:
            return self.elements * DTYPE_BYTES[dtype]
        return self.storage.nbytes(self.shape)


@dataclass(frozen=True)
class LayerCache:
    """What one layer keeps of a sequence: `width` numbers a token (K and V of every KV head, or an
    MLA latent with its rotary part; 0 for none), of the `window` newest tokens (None: of all), and
    `state_bytes` that do not grow (convolution and recurrent state). The width is that of `heads`
    KV heads together, but for `unsplit` numbers that stand beside them (an indexer's key); a latent
    is one head, which no tensor parallelism splits."""

    width: int
    window: int | None = None
    state_bytes: int = 0
    heads: int = 1
    unsplit: int = 0

    def split_width(self, ways: int) -> int:
        """Numbers a token on one of `ways` devices that share the heads; each has one at least."""
        return (self.width - self.unsplit) // self.heads * -(-self.heads // ways) + self.unsplit

    def kept_tokens(self, tokens: int) -> int:
        """Of `tokens`, how many are kept."""
        return tokens if self.window is None else min(tokens, self.window)


@dataclass(frozen=True)
class RopeTable:
    """Cosines and sines of `rows` positions, `width` numbers each. transformers computes them anew
    in every step; vLLM keeps one table for each distinct setting, and counts it as weights."""

    rows: int
    width: int


@dataclass(frozen=True)
class ModelSpec:
    """A decoder-only model's geometry. Sizes are counts of numbers, never bytes.

    `caches` holds one entry a layer. `intermediate_size` is the widest MLP that a token goes
    through, experts' shares together. `head_dim` is that of queries and keys, with latent attention
    that of the keys once they are expanded. `source` is where the weights are: a folder, a .gguf
    file, a hub id, or "" for a bare config or a catalog entry without weights.

    `encoder` is the vision tower with its projector, which `tensors` and `parameters` leave out;
    `encoder_gap` says what is not known of it. `checkpoint_bytes` is what the text model's tensors
    take in the weights' files with all their scales, where the headers of these were read: exact,
    in the format that is stored.

    `converted` is the format that the weights were given here, by the name people use, and that
    what lies at `source` does not have; "" where the tensors are as they lie there.
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
    caches: tuple[LayerCache, ...]
    tensors: tuple[TensorSpec, ...]
    softcap: float | None = None  # of attention scores (Gemma 2)
    runs: bool = True  # whether ullage's runtime has the family; others are planned only
    source: str = ""
    encoder: tuple[TensorSpec, ...] = ()
    encoder_gap: str = ""
    rope_tables: tuple[RopeTable, ...] = ()
    checkpoint_bytes: int | None = None
    converted: str = ""

    def __hash__(self) -> int:
        # Sums over all tensors are cached by model: hashing those each time would cost as much.
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash((self.name, self.caches, self.tensors))

    @property
    def all_layers(self) -> tuple[int, ...]:
        """The numbers of the layers."""
        return tuple(range(self.num_layers))

    @property
    def parameters(self) -> int:
        """Numbers in all weights, tied ones once."""
        return sum(tensor.elements * tensor.count for tensor in self.tensors)

    @property
    def active_parameters(self) -> int:
        """Numbers that one token goes through: of the experts, those that it is sent to."""
        return sum(
            tensor.elements * tensor.count * (tensor.active or tensor.copies) // tensor.copies
            for tensor in self.tensors
        )

    def weights_bytes(self, dtype: str) -> int:
        """Bytes of all weights: quantized ones as they are stored, the others in `dtype`."""
        return self._weights_bytes[dtype]

    @cached_property
    def _weights_bytes(self) -> dict[str, int]:
        """`weights_bytes` by dtype: a search asks for it thousands of times."""
        return {
            dtype: sum(tensor.stored_bytes(dtype) * tensor.count for tensor in self.tensors)
            for dtype in DTYPE_BYTES
        }

    @cached_property
    def cache_kinds(self) -> tuple[tuple[LayerCache, int], ...]:
        """The different entries of `caches`, each with the number of its layers."""
        return tuple(Counter(self.caches).items())

    def encoder_bytes(self, dtype: str) -> int:
        """Bytes of the vision tower and its projector in `dtype`, 0 for a model of text.

        Raises:
            UnknownArchitecture: an encoder that has no arithmetic here.
        """
        if self.encoder_gap:
            raise UnknownArchitecture(f"{self.name or self.family}: {self.encoder_gap}")
        return sum(tensor.stored_bytes(dtype) * tensor.count for tensor in self.encoder)

    def rope_bytes(self, dtype: str) -> int:
        """Bytes of all rotary tables, for an engine that keeps them."""
        return sum(table.rows * table.width for table in self.rope_tables) * DTYPE_BYTES[dtype]

    @property
    def prequantized(self) -> bool:
        """Whether the checkpoint holds quantized weights."""
        return any(tensor.storage is not None for tensor in self.tensors)

    @cached_property
    def stored_formats(self) -> tuple[str, ...]:
        """The formats of quantized weights, in lower case, that of most numbers first."""
        counts = Counter[str]()
        for tensor in self.tensors:
            if tensor.storage is not None:
                counts[tensor.storage.name.lower()] += tensor.elements * tensor.count
        return tuple(name for name, _ in counts.most_common())

    @property
    def kv_width(self) -> int:
        """Numbers that one token adds to the widest layer's KV cache."""
        return max((cache.width for cache in self.caches), default=0)

    @property
    def windows(self) -> tuple[int | None, ...]:
        """One entry a layer: None for full attention, else the tokens that a sliding layer sees."""
        return tuple(cache.window for cache in self.caches)

    @property
    def state_bytes(self) -> int:
        """Bytes a sequence that do not grow with it, over all layers."""
        return sum(cache.state_bytes * count for cache, count in self.cache_kinds)

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; `from_json` gives the same spec back."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "ModelSpec":
        """The spec that `to_json` wrote.

        Raises:
            InputError: a field is missing, or of another type.
        """
        return decode(cls, data, "model")  # type: ignore[no-any-return]
