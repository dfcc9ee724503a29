"""A GGUF file becomes the model that it was made from."""

import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from ullage import ModelSpec, resolve
from ullage.runtime import convert
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_tensor_is_held_at_a_time(tmp_path: Path, dtype: torch.dtype) -> None:
    """Of the largest models, two of the largest weights would pass the budget of a run."""
    shapes = {f"w{n}": torch.Size([n + 1, 3]) for n in range(5)}
    living: weakref.WeakSet[torch.Tensor] = weakref.WeakSet()

    def weights() -> Iterator[tuple[str, torch.Tensor]]:
        for n, (name, shape) in enumerate(shapes.items()):
            assert not living
            weight = torch.full(shape, n + 0.5)
            living.add(weight)
            yield name, weight
            del weight

    convert._write(tmp_path / "w.safetensors", shapes, dtype, weights())
    for n, (name, weight) in enumerate(sorted(load_file(tmp_path / "w.safetensors").items())):
        assert torch.equal(weight, torch.full(shapes[name], n + 0.5, dtype=dtype))


def test_a_weight_of_another_shape_is_refused(tmp_path: Path) -> None:
    shapes, weights = {"w": torch.Size([2, 3])}, iter([("w", torch.zeros(3, 2))])
    with pytest.raises(ValueError, match="w has shape"):
        convert._write(tmp_path / "w.safetensors", shapes, torch.float32, weights)
