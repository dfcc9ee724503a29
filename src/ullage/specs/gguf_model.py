"""The model that a GGUF header describes: from llama.cpp's words to those of config.json."""

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

from ullage.errors import CheckpointError, UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.gguf import GGUFHeader, GGUFTensor, read_parts
from ullage.specs.model import ModelSpec

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
_NO_WEIGHTS = re.compile(
    r"rope_(freqs|factors_long|factors_short)\.weight|blk\.\d+\.attn_rot_embd.*"
)


def spec_from_gguf(path: Path) -> ModelSpec:
    """The spec of the model in a GGUF file, or in all the files that it is the first of. Its dtype
    is fp32, since it is dequantized when loaded; `checkpoint_bytes` is what llama.cpp keeps.

    Raises:
        CheckpointError: a file is damaged, or its tensors are not those of its architecture.
        UnknownArchitecture: an architecture that has no arithmetic here.
    """
    header = read_parts(path)
    config = config_from_gguf(header)
    spec = spec_from_config(config, name=path.stem, source=str(path))
    tensors = _loaded(header, spec.num_layers)
    stored = sum(prod(tensor.shape) for tensor in tensors if not _NO_WEIGHTS.fullmatch(tensor.name))
    if stored != spec.parameters:
        raise CheckpointError(
            f"{path} holds {stored:,} parameters, but its metadata describes {spec.parameters:,}."
        )
    return replace(spec, checkpoint_bytes=sum(tensor.nbytes for tensor in tensors))


def config_from_gguf(header: GGUFHeader) -> dict[str, Any]:
    """What config.json would say of the model with this header.

    Raises:
        UnknownArchitecture: an architecture that has no arithmetic here.
    """
    words = _Words(header)
    arch = words.arch
    if arch not in _ARCHITECTURES:
        raise UnknownArchitecture(
            f"There is no arithmetic for the GGUF architecture {arch[:60]!r}, and ullage does not "
            f"guess. Known: {', '.join(_ARCHITECTURES)}."
        )
    keys = _GPT2_KEYS if arch == "gpt2" else _KEYS
    model_type, extras = _ARCHITECTURES[arch]
    return {
        **{ours: words.get(theirs) for theirs, ours in keys.items()},
        **_attention(words),
        "model_type": model_type,
        "vocab_size": words.get("vocab_size") or words.rows("token_embd.weight"),
        "tie_word_embeddings": not words.has("output.weight"),
        "attention_bias": words.has("blk.0.attn_q.bias"),
        "mlp_bias": words.has("blk.0.ffn_gate.bias"),
        "dtype": "float32",
        **extras(words),
    }


class _Words:
    """A header's metadata, less the architecture's name before each key, and its tensors."""

    def __init__(self, header: GGUFHeader) -> None:
        self._metadata = header.metadata
        self._shapes = {tensor.name: tensor.shape for tensor in header.tensors}
        self.arch = str(header.metadata.get("general.architecture"))

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get(f"{self.arch}.{key}", default)

    def number(self, key: str) -> int:
        """An integer that is no lie, else 0."""
        value = self.get(key)
        return value if type(value) is int and 0 < value < 1 << 31 else 0

    def has(self, tensor: str) -> bool:
        return tensor in self._shapes

    def rows(self, tensor: str) -> int | None:
        shape = self._shapes.get(tensor)
        return shape[0] if shape else None

    def anywhere(self, suffix: str) -> bool:
        """Whether some layer has such a tensor."""
        return any(name.endswith(suffix) for name in self._shapes)


def _attention(words: _Words) -> dict[str, Any]:
    """Heads and windows. What llama.cpp leaves out it derives, where transformers has defaults."""
    heads, width = words.number("attention.head_count"), words.number("embedding_length")
    derived = width // heads if heads else None
    known: dict[str, Any] = {
        "num_key_value_heads": words.get(
            "attention.head_count_kv", words.get("attention.head_count")
        ),
        "head_dim": words.get("attention.key_length", derived),
    }
    window = words.get("attention.sliding_window")
    if window is not None and words.arch != "qwen2":
        known["sliding_window"] = window or None
    if words.get("attn_logit_softcapping") is not None:
        known["attn_logit_softcapping"] = words.get("attn_logit_softcapping")
    return known


def _nothing(words: _Words) -> dict[str, Any]:
    return {}


def _experts(words: _Words) -> dict[str, Any]:
    """Experts, by the words of every family that has some."""
    known = {
        "num_local_experts": words.get("expert_count"),
        "num_experts": words.get("expert_count"),
        "n_routed_experts": words.get("expert_count"),
        "num_experts_per_tok": words.get("expert_used_count"),
        "n_shared_experts": words.get("expert_shared_count", 0),
        "first_k_dense_replace": words.get("leading_dense_block_count", 0),
        "shared_expert_intermediate_size": words.get("expert_shared_feed_forward_length"),
        "moe_intermediate_size": words.get("expert_feed_forward_length"),
    }
    if known["moe_intermediate_size"] is None:  # all of the layer's width is theirs
        known["moe_intermediate_size"] = words.get("feed_forward_length")
    return known


def _llama(words: _Words) -> dict[str, Any]:
    """Mixtral calls itself a llama."""
    if not words.get("expert_count"):
        return {}
    return {**_experts(words), "model_type": "mixtral", "sliding_window": None}


def _mistral3(words: _Words) -> dict[str, Any]:
    return _llama(words) or {"sliding_window": words.get("attention.sliding_window")}


def _qwen_moe(words: _Words) -> dict[str, Any]:
    known = _experts(words)
    if not words.anywhere("ffn_gate_shexp.weight"):
        known["shared_expert_intermediate_size"] = 0
    return known


def _ahead(words: _Words) -> dict[str, Any]:
    """Blocks behind the last predict more tokens, and are not loaded."""
    blocks, ahead = words.get("block_count"), words.number("nextn_predict_layers")
    counted = type(blocks) is int and blocks > ahead
    return {"num_hidden_layers": blocks - ahead} if ahead and counted else {}


def _glm4_moe(words: _Words) -> dict[str, Any]:
    use_norm = words.anywhere("attn_q_norm.weight")
    return {**_experts(words), "use_qk_norm": use_norm, **_ahead(words)}


def _deepseek(words: _Words) -> dict[str, Any]:
    """Older files state the sizes of expanded heads, newer ones those of the latent beside them."""
    rotary = words.number("rope.dimension_count")
    key = words.number("attention.key_length_mla") or words.number("attention.key_length")
    values = words.get("attention.value_length_mla") or words.get("attention.value_length")
    balanced = words.anywhere("exp_probs_b.bias") or words.anywhere("exp_probs_b")
    return {
        **_experts(words),
        **_ahead(words),
        "model_type": "deepseek_v3" if balanced else "deepseek_v2",
        "attention_bias": False,
        "kv_lora_rank": words.get("attention.kv_lora_rank"),
        "q_lora_rank": words.get("attention.q_lora_rank"),
        "qk_rope_head_dim": rotary or None,
        "qk_nope_head_dim": key - rotary,
        "v_head_dim": values,
    }


def _delta(words: _Words) -> dict[str, Any]:
    """Qwen's linear attention, in the words of state-space models."""
    heads, inner = words.number("ssm.time_step_rank"), words.number("ssm.inner_size")
    known = _qwen_moe(words) if words.get("expert_count") else {}
    return {
        **known,
        **_ahead(words),
        "linear_num_key_heads": words.get("ssm.group_count"),
        "linear_key_head_dim": words.get("ssm.state_size"),
        "linear_num_value_heads": words.get("ssm.time_step_rank"),
        "linear_value_head_dim": inner // heads if heads else None,
        "linear_conv_kernel_dim": words.get("ssm.conv_kernel"),
        "full_attention_interval": words.get("full_attention_interval", 4),
        "attention_bias": False,
    }


def _falcon(words: _Words) -> dict[str, Any]:
    """Two norms before a layer mean the new architecture."""
    heads = words.get("attention.head_count_kv")
    grouped = words.has("blk.0.attn_norm_2.weight")
    return {
        "new_decoder_architecture": grouped,
        "num_kv_heads": heads,
        "multi_query": heads == 1,
        "parallel_attn": not words.has("blk.0.ffn_norm.weight"),
        "bias": words.has("blk.0.attn_qkv.bias"),
        "ffn_hidden_size": words.get("feed_forward_length"),
    }


def _olmo(words: _Words) -> dict[str, Any]:
    """Olmo 3 slides."""
    return {"model_type": "olmo3"} if words.get("attention.sliding_window") else {}


_Extras = Callable[[_Words], dict[str, Any]]
_ARCHITECTURES: Mapping[str, tuple[str, _Extras]] = {
    "llama": ("llama", _llama),
    "mistral3": ("ministral3", _mistral3),
    "qwen2": ("qwen2", _nothing),
    "qwen3": ("qwen3", _nothing),
    "gemma": ("gemma", _nothing),
    "gemma2": ("gemma2", _nothing),
    "gemma3": ("gemma3_text", _nothing),
    "phi2": ("phi", _nothing),
    "phi3": ("phi3", _nothing),
    "gpt2": ("gpt2", _nothing),
    "granite": ("granite", _nothing),
    "smollm3": ("smollm3", _nothing),
    "seed_oss": ("seed_oss", lambda w: {"attention_out_bias": w.has("blk.0.attn_output.bias")}),
    "olmo2": ("olmo2", _olmo),
    "glm4": ("glm4", _ahead),
    "command-r": ("cohere", lambda w: {"use_qk_norm": w.has("blk.0.attn_q_norm.weight")}),
    "cohere2": ("cohere2", _nothing),
    "starcoder2": ("starcoder2", lambda w: {"use_bias": w.has("blk.0.attn_q.bias")}),
    "stablelm": (
        "stablelm",
        lambda w: {
            "use_qkv_bias": w.has("blk.0.attn_q.bias"),
            "qk_layernorm": w.has("blk.0.attn_q_norm.weight"),
            "use_parallel_residual": not w.has("blk.0.ffn_norm.weight"),
        },
    ),
    "falcon": ("falcon", _falcon),
    "qwen2moe": ("qwen2_moe", _qwen_moe),
    "qwen3moe": ("qwen3_moe", _qwen_moe),
    "qwen3vl": ("qwen3", _nothing),
    "qwen3vlmoe": ("qwen3_moe", _qwen_moe),
    "granitemoe": ("granitemoe", _experts),
    "phimoe": (
        "phimoe",
        lambda w: {**_experts(w), "lm_head_bias": w.has("output.bias"), "attention_bias": True},
    ),
    "gpt-oss": ("gpt_oss", _experts),
    "glm4moe": ("glm4_moe", _glm4_moe),
    "minimax-m2": ("minimax_m2", _experts),
    "deepseek2": ("deepseek_v2", _deepseek),
    "qwen3next": ("qwen3_next", _delta),
    "qwen35": ("qwen3_5_text", _delta),
    "qwen35moe": ("qwen3_5_moe_text", _delta),
}


def _loaded(header: GGUFHeader, num_layers: int) -> list[GGUFTensor]:
    """The tensors less those of blocks behind the last."""

    def behind(name: str) -> bool:
        block = re.match(r"blk\.(\d{1,5})\.", name)
        return block is not None and int(block[1]) >= num_layers

    ahead = header.metadata.get(
        f"{header.metadata.get('general.architecture')}.nextn_predict_layers"
    )
    return [tensor for tensor in header.tensors if not (ahead and behind(tensor.name))]
