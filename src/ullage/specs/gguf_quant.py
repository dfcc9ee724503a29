"""What llama-quantize makes of a model: the type of every tensor in a GGUF file, by the rules of
`gguf_mixtures`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ullage.specs.gguf import BLOCKS, GGUFHeader, GGUFTensor
from ullage.specs.gguf_mixtures import MIXTURES, NARROWER, Category, Place
from ullage.specs.model import ModelSpec, Role, Storage, TensorSpec

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
        self.placed: dict[Category | None, list[TensorSpec]] = {}
        for tensor in self.tensors:
            self.placed.setdefault(_category(tensor), []).append(tensor)
        kinds: tuple[Category, ...] = ("v", "down", "up", "gate")
        self.layers = {kind: self._layers_with(kind) for kind in kinds}
        self.downs = self._ordered_downs()

    def typed(self, tensor: TensorSpec) -> Iterator[TensorSpec]:
        """`tensor` in its type: several, where layers differ."""
        category, by_type = _category(tensor), dict[str, list[int]]()
        for layer in tensor.layers or (0,):
            by_type.setdefault(self._type(tensor, category, layer), []).append(layer)
        for ggml_type, layers in by_type.items():
            kept = tuple(layers) if tensor.layers else ()
            yield replace(tensor, layers=kept, storage=_storage(ggml_type))

    def _layers_with(self, category: Category) -> list[int]:
        return sorted({layer for t in self.placed.get(category, ()) for layer in t.layers})

    def _ordered_downs(self) -> list[tuple[int, int, str]]:
        """All down projections in the order of a GGUF file, where experts are one tensor."""
        downs = self.placed.get("down", ())
        return sorted(_in_file(tensor, layer) for tensor in downs for layer in tensor.layers)

    def _type(self, tensor: TensorSpec, category: Category | None, layer: int) -> str:
        if category is None:
            return "F32"
        columns = _columns(self.model, tensor, category)
        wanted = "MXFP4" if self._in_mxfp4(tensor) else self._wanted(tensor, category, layer)
        if columns % BLOCKS[wanted][0]:
            wanted = NARROWER.get(wanted, "F16")
        return "F16" if columns % BLOCKS[wanted][0] else wanted

    def _in_mxfp4(self, tensor: TensorSpec) -> bool:
        stored = tensor.storage is not None and tensor.storage.name.lower() == "mxfp4"
        return tensor.role == "expert" and (stored or self.mxfp4)

    def _wanted(self, tensor: TensorSpec, category: Category, layer: int) -> str:
        """The type by the rules, whatever the tensor's shape but that of an output head."""
        mixture, model = self.mixture, self.model
        if category == "output" or (category == "embedding" and model.tie_embeddings):
            columns = _columns(model, tensor, category)
            return "Q8_0" if columns % BLOCKS[mixture.base][0] else mixture.output
        if self.experts == 8 and category in ("v", "k", "o"):
            return mixture.of_eight.get(category, mixture.base)
        wanted = mixture.wanted(category, self._place(tensor, category, layer))
        wide = category == "v" and not mixture.lowest and self._is_70b()
        return "Q5_K" if wide and wanted in ("Q3_K", "Q4_K") else wanted

    def _is_70b(self) -> bool:
        model = self.model
        grouped = model.num_heads != model.num_kv_heads
        return model.num_layers == 80 and grouped and model.family in ("llama", "qwen2")

    def _place(self, tensor: TensorSpec, category: Category, layer: int) -> Place:
        model, layers = self.model, self.layers.get(category, [])
        index = layers.index(layer) if layer in layers else 0
        groups = model.num_heads // model.num_kv_heads
        if category == "v":
            return Place(index, len(layers), groups, self.experts)
        if category == "down" and self.mixture.lowest:
            index = self.downs.index(_in_file(tensor, layer))
        elif self.experts > 1:
            index = layer
        return Place(index, model.num_layers, groups, self.experts)


def _in_file(tensor: TensorSpec, layer: int) -> tuple[int, int, str]:
    """Where a GGUF file has it: ffn_down, ffn_down_exps, ffn_down_shexp."""
    kind = 1 if tensor.role == "expert" else 2 * ("shared" in tensor.name)
    return layer, kind, tensor.name


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
