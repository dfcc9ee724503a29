"""What llama-quantize makes of a model: the type of every tensor in a GGUF file, by its rules.

A mixture such as Q4_K_M gives some tensors more bits than its name says. The rules are data here,
as they stand in src/llama-quant.cpp of llama.cpp b11434, for a file without importance matrix but
for the IQ types, which are made with one.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from ullage.specs.gguf import BLOCKS, GGUFHeader, GGUFTensor
from ullage.specs.model import ModelSpec, Role, Storage, TensorSpec

# What llama-quantize calls them: attn_v (q, k and v in one weight too), attn_k, ..., and the ends.
Category = Literal["v", "k", "q", "o", "up", "gate", "down", "embedding", "output", "other"]


@dataclass(frozen=True)
class _Place:
    """Where a tensor stands: the `index`-th of `count` layers, with `groups` query heads to a KV
    head."""

    index: int
    count: int
    groups: int


def _ends_and_thirds(place: _Place) -> bool:
    eighth = place.count // 8
    last = place.index >= 7 * place.count // 8
    return place.index < eighth or last or (place.index - eighth) % 3 == 2


_WHERE: Mapping[str, Callable[[_Place], bool]] = {
    "": lambda place: True,
    "ends and thirds": _ends_and_thirds,
    "first eighth": lambda place: place.index < place.count // 8,
    "first sixteenth": lambda place: place.index < place.count // 16,
    "first 2": lambda place: place.index < 2,
    "first 4": lambda place: place.index < 4,
    "4 groups": lambda place: place.groups >= 4,
}


@dataclass(frozen=True)
class Mixture:
    """The type of most tensors, and by category others with where they apply, the first that does.
    `output` is the head's, and that of an embedding that serves as one."""

    base: str
    rules: Mapping[Category, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    output: str = "Q6_K"
    output_of_eight: str = ""  # of attention's output in models of 8 experts


_MORE = (("Q6_K", "ends and thirds"),)

MIXTURES: Mapping[str, Mixture] = {
    "fp32": Mixture("F32", output="F32"),
    "bf16": Mixture("BF16", output="BF16"),
    "fp16": Mixture("F16", output="F16"),
    "q8_0": Mixture("Q8_0", output="Q8_0"),
    "q6_k": Mixture("Q6_K"),
    "q5_k_m": Mixture("Q5_K", {"v": _MORE, "down": _MORE}),
    "q5_k_s": Mixture("Q5_K"),
    "q5_1": Mixture("Q5_1"),
    "q5_0": Mixture("Q5_0"),
    "q4_k_m": Mixture("Q4_K", {"v": _MORE, "down": _MORE}, output_of_eight="Q5_K"),
    "q4_k_s": Mixture(
        "Q4_K",
        {"v": (("Q5_K", "first 4"),), "down": (("Q5_K", "first eighth"),)},
        output_of_eight="Q5_K",
    ),
    "q4_1": Mixture("Q4_1"),
    "q4_0": Mixture("Q4_0"),
    "iq4_nl": Mixture("IQ4_NL", {"v": (("Q5_K", "4 groups"),)}, output_of_eight="Q5_K"),
    "iq4_xs": Mixture("IQ4_XS", {"v": (("Q5_K", "4 groups"),)}, output_of_eight="Q5_K"),
    "mxfp4": Mixture("Q8_0", output="Q8_0"),
    "q3_k_l": Mixture(
        "Q3_K", {"v": (("Q5_K", ""),), "down": (("Q5_K", ""),), "o": (("Q5_K", ""),)}
    ),
    "q3_k_m": Mixture(
        "Q3_K",
        {
            "v": (("Q5_K", "first 2"), ("Q4_K", "")),
            "down": (("Q5_K", "first sixteenth"), ("Q4_K", "")),
            "o": (("Q4_K", ""),),
        },
        output_of_eight="Q5_K",
    ),
    "q3_k_s": Mixture("Q3_K", output_of_eight="Q5_K"),
    "iq3_m": Mixture(
        "IQ3_S",
        {
            "v": (("Q4_K", ""),),
            "down": (("Q4_K", "first eighth"),),
            "o": (("Q4_K", ""),),
        },
        output_of_eight="Q5_K",
    ),
    "q2_k": Mixture(
        "Q2_K",
        {
            "v": (("Q4_K", "4 groups"), ("Q3_K", "")),
            "down": (("Q3_K", ""),),
            "o": (("Q3_K", ""),),
        },
        output_of_eight="Q5_K",
    ),
}
"""The file types by the names that people use in lower case, the plain ones by ours."""

# What a type becomes whose blocks do not divide a tensor's columns; F16 where this does not either.
_NARROWER = {
    "IQ3_S": "IQ4_NL",
    "IQ4_XS": "IQ4_NL",
    "Q2_K": "Q4_0",
    "Q3_K": "Q4_0",
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}

# The last words of a checkpoint's names, the first that is found. Its routers, convolutions, norms
# and position embeddings stay F32.
_WORDS: tuple[tuple[str, Category | None], ...] = (
    (r"norm|conv1d|\bconv\b|\bwpe\b|indexer\.weights_proj|per_layer_model_projection", None),
    (r"(\.gate|\brouter(\.layer|\.proj)?)\.weight$", None),
    (r"v_b_proj|k_b_proj|q_a_proj|q_b_proj|kv_a_proj|indexer", "other"),
    (r"linear_attn\.out_proj|mamba|in_proj_(qkvz|z|a|b|ba)\b", "other"),
    (r"v_proj|qkv_proj|query_key_value|c_attn|wqkv|in_proj_qkv", "v"),
    (r"k_proj", "k"),
    (r"q_proj", "q"),
    (r"o_proj|attn\.c_proj|self_attn\.dense|self_attention\.dense|attention\.wo", "o"),
    (r"down_proj|\bw2\b|fc2|mlp\.c_proj|4h_to_h|output_linear", "down"),
    (r"up_proj|\bw3\b|fc1|c_fc|h_to_4h|input_linear", "up"),
    (r"gate_proj|\bw1\b", "gate"),
)
_CATEGORIES = tuple((re.compile(words), category) for words, category in _WORDS)

# Of a file's tensors, those that llama.cpp does not put beside the layers.
_ROLES: Mapping[str, Role] = {
    "token_embd.weight": "embedding",
    "per_layer_token_embd.weight": "embedding",
    "position_embd.weight": "embedding",
    "output.weight": "head",
}


def as_gguf(model: ModelSpec, name: str) -> ModelSpec:
    """`model` with every tensor in the type that it has in the GGUF file type `name`, one of
    `MIXTURES`. Experts that are in MXFP4 already stay so: llama-quantize does not touch them."""
    quantizer = _Quantizer(model, name)
    typed = (part for tensor in quantizer.tensors for part in quantizer.typed(tensor))
    return replace(model, tensors=tuple(typed), converted=name)


def is_gguf(model: ModelSpec) -> bool:
    """Whether every tensor has a GGUF type."""
    return all(t.storage is not None and t.storage.name in BLOCKS for t in model.tensors)


def as_stored(model: ModelSpec, header: GGUFHeader) -> ModelSpec:
    """`model` with the tensors of its GGUF file, every one as it lies there."""
    return replace(model, tensors=tuple(_stored(tensor) for tensor in header.tensors))


def _stored(tensor: GGUFTensor) -> TensorSpec:
    storage = _storage(tensor.ggml_type)
    return TensorSpec(tensor.name, tensor.shape, _ROLES.get(tensor.name, "other"), storage=storage)


def _storage(ggml_type: str) -> Storage:
    numbers, nbytes = BLOCKS[ggml_type]
    return Storage(ggml_type, nbytes * 8 / numbers)


class _Quantizer:
    """The rules of one file type for one model."""

    def __init__(self, model: ModelSpec, name: str) -> None:
        self.model, self.mixture, self.mxfp4 = model, MIXTURES[name], name == "mxfp4"
        self.tensors = [part for tensor in model.tensors for part in _unfold(model, tensor)]
        self.experts = max((tensor.copies for tensor in self.tensors), default=1)
        self.layers = {kind: self._layers_with(kind) for kind in ("v", "down")}

    def typed(self, tensor: TensorSpec) -> Iterator[TensorSpec]:
        """`tensor` in its type: several, where layers differ."""
        category, by_type = _category(tensor), dict[str, list[int]]()
        for layer in tensor.layers or (0,):
            by_type.setdefault(self._type(tensor, category, layer), []).append(layer)
        for ggml_type, layers in by_type.items():
            kept = tuple(layers) if tensor.layers else ()
            yield replace(tensor, layers=kept, storage=_storage(ggml_type))

    def _layers_with(self, category: str) -> list[int]:
        found = {layer for t in self.tensors if _category(t) == category for layer in t.layers}
        return sorted(found)

    def _type(self, tensor: TensorSpec, category: Category | None, layer: int) -> str:
        if category is None:
            return "F32"
        columns = _columns(self.model, tensor, category)
        wanted = "MXFP4" if self._in_mxfp4(tensor) else self._wanted(category, layer, columns)
        if columns % BLOCKS[wanted][0]:
            wanted = _NARROWER.get(wanted, "F16")
        return "F16" if columns % BLOCKS[wanted][0] else wanted

    def _in_mxfp4(self, tensor: TensorSpec) -> bool:
        stored = tensor.storage is not None and tensor.storage.name.lower() == "mxfp4"
        return tensor.role == "expert" and (stored or self.mxfp4)

    def _wanted(self, category: Category, layer: int, columns: int) -> str:
        """The type by the rules, whatever the tensor's shape."""
        mixture, base = self.mixture, self.mixture.base
        if category == "output" or (category == "embedding" and self.model.tie_embeddings):
            return "Q8_0" if columns % BLOCKS[base][0] else mixture.output
        if self.experts == 8 and category in ("v", "k", "o"):
            return self._of_eight(category)
        place = self._place(category, layer)
        rules = mixture.rules.get(category, ())
        wanted = next((better for better, where in rules if _WHERE[where](place)), base)
        if category == "v" and self._is_70b() and wanted in ("Q3_K", "Q4_K"):
            return "Q5_K"
        return wanted

    def _of_eight(self, category: Category) -> str:
        """Mixtral's attention is small beside its experts."""
        if BLOCKS[self.mixture.base][0] == 1:
            return self.mixture.base
        return (self.mixture.output_of_eight or self.mixture.base) if category == "o" else "Q8_0"

    def _is_70b(self) -> bool:
        model = self.model
        grouped = model.num_heads != model.num_kv_heads
        return model.num_layers == 80 and grouped and model.family in ("llama", "qwen2")

    def _place(self, category: Category, layer: int) -> _Place:
        model, layers = self.model, self.layers.get(category, [])
        index = layers.index(layer) if layer in layers else 0
        if category == "v":
            return _Place(index, len(layers), model.num_heads // model.num_kv_heads)
        if self.experts > 1:
            index = layer
        return _Place(index, model.num_layers, 1)


def _category(tensor: TensorSpec) -> Category | None:
    """None for what stays F32: vectors, and what `_CATEGORIES` says."""
    if len(tensor.shape) == 1 or tensor.shape[0] == 1:
        return None
    found: Category | None = next(
        (kind for words, kind in _CATEGORIES if words.search(tensor.name)), "other"
    )
    if found is None or tensor.role not in ("embedding", "head"):
        return found
    return "embedding" if tensor.role == "embedding" else "output"


def _columns(model: ModelSpec, tensor: TensorSpec, category: Category) -> int:
    """The side that is summed over, also where a checkpoint stores ``[in, out]``."""
    rows, columns = tensor.shape[-2:]
    if model.hidden_size not in (rows, columns) or category == "other":
        return columns
    if category in ("o", "down"):
        return rows if columns == model.hidden_size else columns
    return model.hidden_size


def _unfold(model: ModelSpec, tensor: TensorSpec) -> Iterator[TensorSpec]:
    """MLA's kv_b_proj as llama.cpp holds it: keys, transposed, and values apart."""
    if not tensor.name.endswith(".kv_b_proj.weight"):
        yield tensor
        return
    rows, latent = tensor.shape
    outs = (t.shape[1] for t in model.tensors if t.name.endswith("self_attn.o_proj.weight"))
    values = next(outs)
    yield replace(
        tensor,
        name=tensor.name.replace("kv_b_proj", "k_b_proj"),
        shape=(model.num_heads * latent, (rows - values) // model.num_heads),
    )
    yield replace(tensor, name=tensor.name.replace("kv_b_proj", "v_b_proj"), shape=(values, latent))
