"""A GGUF file becomes the model that it was made from."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ullage import ModelSpec, resolve
from ullage.runtime.checkpoint import weights_folder
from ullage.runtime.load import load_tokenizer

TinyModel = Callable[..., tuple[Any, ModelSpec]]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_weights_are_those_of_the_model(
    gguf_file: Path, ullage_cache: Path, tiny_model: TinyModel, dtype: str
) -> None:
    folder = weights_folder(resolve(str(gguf_file)), dtype)
    converted = load_file(folder / "model.safetensors")
    expected, _ = tiny_model("llama")
    assert set(converted) == set(expected.state_dict())
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(converted[name], weight.to(getattr(torch, dtype)))


def test_the_folder_is_the_same_model_to_the_planner(gguf_file: Path, ullage_cache: Path) -> None:
    from_gguf = resolve(str(gguf_file))
    from_folder = resolve(str(weights_folder(from_gguf)))
    assert from_folder.tensors == from_gguf.tensors
    assert from_folder.max_context_tokens == from_gguf.max_context_tokens


def test_the_tokenizer_comes_along(gguf_file: Path, ullage_cache: Path) -> None:
    tokenizer = load_tokenizer(weights_folder(resolve(str(gguf_file))))
    assert tokenizer.decode(tokenizer("the cat")["input_ids"]) == "the cat"
    assert tokenizer.eos_token_id == 1
