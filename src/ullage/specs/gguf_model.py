"""The model that a GGUF header describes: from llama.cpp's words to those of config.json."""

from pathlib import Path
from typing import Any

from ullage.errors import CheckpointError, UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.gguf import GGUFHeader, GGUFTensor, read_header
from ullage.specs.model import ModelSpec

_MODEL_TYPES = {
    "llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma": "gemma", "gemma2": "gemma2",
    "gemma3": "gemma3_text", "phi2": "phi", "phi3": "phi3", "gpt2": "gpt2",
}  # fmt: skip
_KEYS = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "context_length": "max_position_embeddings",
}
_GPT2_KEYS = {
    "block_count": "n_layer",
    "embedding_length": "n_embd",
    "feed_forward_length": "n_inner",
    "attention.head_count": "n_head",
    "context_length": "n_positions",
}
_NO_WEIGHTS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")


def spec_from_gguf(path: Path) -> ModelSpec:
    """The spec of the model in a GGUF file. Its dtype is fp32, since it is dequantized when loaded.

    Raises:
        CheckpointError: the file is damaged, or its tensors are not those of its architecture.
        UnknownArchitecture: an architecture that has no arithmetic here.
    """
    header = read_header(path)
    spec = spec_from_config(config_from_gguf(header), name=path.stem, source=str(path))
    stored = sum(_elements(tensor) for tensor in header.tensors if tensor.name not in _NO_WEIGHTS)
    if stored != spec.parameters:
        raise CheckpointError(
            f"{path} holds {stored:,} parameters, but its metadata describes {spec.parameters:,}."
        )
    return spec


def config_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """What config.json would say of the model with this header.

    Raises:
        UnknownArchitecture: an architecture that has no arithmetic here, or experts.
    """
    arch = str(header.metadata.get("general.architecture"))
    if arch not in _MODEL_TYPES:
        raise UnknownArchitecture(
            f"There is no arithmetic for the GGUF architecture {arch[:60]!r}, and ullage does not "
            f"guess. Known: {', '.join(_MODEL_TYPES)}."
        )
    if header.metadata.get(f"{arch}.expert_count"):
        raise UnknownArchitecture("There is no arithmetic for mixtures of experts.")
    shapes = {tensor.name: tensor.shape for tensor in header.tensors}
    keys = _GPT2_KEYS if arch == "gpt2" else _KEYS
    config = {ours: header.metadata.get(f"{arch}.{theirs}") for theirs, ours in keys.items()}
    return {
        **config,
        **_attention(header.metadata, arch),
        "model_type": _MODEL_TYPES[arch],
        "vocab_size": header.metadata.get(f"{arch}.vocab_size") or _rows(shapes),
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "dtype": "float32",
    }


def _attention(metadata: dict[str, Any], arch: str) -> dict[str, Any]:
    """Heads and windows. What llama.cpp leaves out it derives, where transformers has defaults."""
    heads = metadata.get(f"{arch}.attention.head_count")
    width = metadata.get(f"{arch}.embedding_length")
    derived = (
        width // heads if isinstance(width, int) and isinstance(heads, int) and heads else None
    )
    known: dict[str, Any] = {
        "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
        "head_dim": metadata.get(f"{arch}.attention.key_length", derived),
    }
    if f"{arch}.attention.sliding_window" in metadata and arch != "qwen2":
        known["sliding_window"] = metadata[f"{arch}.attention.sliding_window"] or None
    if f"{arch}.attn_logit_softcapping" in metadata:
        known["attn_logit_softcapping"] = metadata[f"{arch}.attn_logit_softcapping"]
    return known


def _rows(shapes: dict[str, tuple[int, ...]]) -> int | None:
    shape = shapes.get("token_embd.weight")
    return shape[0] if shape else None


def _elements(tensor: GGUFTensor) -> int:
    product = 1
    for size in tensor.shape:
        product *= size
    return product
