"""Tiny random models of every family, built here: no test downloads anything.

torch and transformers are imported when a fixture needs them, so that tests of the arithmetic start
at once.
"""

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec

# A busy machine is no failure: examples have no deadline.
settings.register_profile("ullage", deadline=None)
settings.load_profile("ullage")

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide enough that attention decides which token comes next; 0.02 would leave that to the
    # embeddings, and tests would pass without attention.
    "initializer_range": 0.4,
    "bos_token_id": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "num_hidden_layers": 3, "layer_types": _MIXED_LAYERS, "sliding_window": 6, "head_dim": 8,
        "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20, "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "num_hidden_layers": 3, "layer_types": _MIXED_LAYERS, "sliding_window": 6, "head_dim": 8,
        "query_pre_attn_scalar": 20,
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 256,
        "num_key_value_heads": None,
    },
}  # fmt: skip


def _config(family: str) -> dict[str, Any]:
    return {"model_type": family, **_SIZES, **CONFIGS[family]}


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[..., ModelSpec]:
    """`tiny_spec(family, **changes)`: the spec of a tiny model, without torch."""

    def make(family: str, **changes: Any) -> ModelSpec:
        return spec_from_config({**_config(family), **changes}, name=f"tiny-{family}")

    return make


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., tuple[Any, ModelSpec]]:
    """`tiny_model(family, **changes)`: a new random fp32 model, always the same one, and its
    spec."""

    def make(family: str, **changes: Any) -> tuple[Any, ModelSpec]:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)  # threads cost more than these models do
        config = AutoConfig.for_model(**_config(family) | changes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
        return model, spec_from_config(model.config.to_dict(), name=f"tiny-{family}")

    return make


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., tuple[Any, ModelSpec]]
) -> Callable[[str], Path]:
    """`model_folder(family)`: a tiny model as people publish them: config, safetensors, tokenizer.
    Shared by all tests: copy it before changing it. Token 1 ends a text."""

    @functools.cache
    def save(family: str) -> Path:
        folder = tmp_path_factory.mktemp("models") / family
        model, _ = tiny_model(family, eos_token_id=1)
        model.save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        return folder

    return save


def _tokenizer() -> Any:
    """A word a token: <pad>, <eos>, <bos>, <unk>, user, assistant, w6 .. w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "user",
        "assistant",
        *(f"w{n}" for n in range(6, 64)),
    ]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    return tokenizer


@pytest.fixture
def ullage_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that ullage takes for the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ULLAGE_CACHE", str(folder))
    return folder
