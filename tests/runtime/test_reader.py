"""Reading: what is stored, whatever it is called and cut into, or an error of ours."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_cases import FILE, assert_same_weights, edit, load, recipe_for
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ullage.errors import CheckpointError

ModelFolder = Callable[..., Path]


def test_a_bf16_checkpoint_loads_as_fp32(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    edit(folder, lambda weights: weights.update({k: v.bfloat16() for k, v in weights.items()}))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_weights(load(folder), expected, torch.float32)


def test_shards_are_read_too(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    expected = AutoModelForCausalLM.from_pretrained(folder)
    (folder / FILE).unlink()
    expected.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert_same_weights(load(folder), expected, torch.float32)


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_a_tied_head_that_is_stored_too_changes_nothing(
    family: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(family)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    embedding = "model.embed_tokens.weight"
    edit(folder, lambda weights: weights.update({"lm_head.weight": weights[embedding]}))
    loaded = load(folder)
    assert loaded.model.lm_head.weight is loaded.model.model.embed_tokens.weight
    assert_same_weights(loaded, expected, torch.float32)


@pytest.mark.parametrize("family", ["qwen2", "gemma"])
def test_a_head_of_its_own_under_a_config_that_ties_it_is_refused(
    family: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(family)

    def store_another_head(weights: dict[str, torch.Tensor]) -> None:
        head = weights["model.embed_tokens.weight"].clone()
        head[-1, -1] += 1
        weights["lm_head.weight"] = head

    edit(folder, store_another_head)
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        load(folder)


@pytest.mark.parametrize("family", ["gpt2", "qwen2"])
def test_names_without_the_models_prefix_are_understood(
    family: str, copied: Callable[[str], Path]
) -> None:
    """As in GPT-2's own checkpoint, which was saved without its head, masks included."""
    folder, prefix = copied(family), {"gpt2": "transformer.", "qwen2": "model."}[family]
    expected = AutoModelForCausalLM.from_pretrained(folder)
    bare = {key.removeprefix(prefix): w for key, w in load_file(folder / FILE).items()}
    if family == "gpt2":
        bare["h.0.attn.bias"] = torch.ones(1, 1, 8, 8)
    save_file(bare, folder / FILE)
    assert_same_weights(load(folder), expected, torch.float32)


def drop(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.layers.1.mlp.up_proj.weight"]


def add(weights: dict[str, torch.Tensor]) -> None:
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(48, 32)


def reshape(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].T.contiguous()


def to_integers(weights: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name] = weights[name].to(torch.int8)


@pytest.mark.parametrize("scheme", ["none", "int8"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(drop, "lacks"), (add, "no place for"), (reshape, "shape"), (to_integers, "I8")],
)
def test_a_checkpoint_that_is_not_its_configs_is_refused(
    copied: Callable[[str], Path], damage: Any, message: str, scheme: str
) -> None:
    folder = copied("llama")
    recipe = recipe_for(folder, scheme=scheme)  # of the whole checkpoint: it may change afterwards
    edit(folder, damage)
    with pytest.raises(CheckpointError, match=message):
        load(folder, recipe)


@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_refused(copied: Callable[[str], Path], kept: float) -> None:
    folder = copied("llama")
    recipe, data = recipe_for(folder), (folder / FILE).read_bytes()
    (folder / FILE).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=FILE):
        load(folder, recipe)


def test_a_file_that_shrinks_while_it_is_read_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    size = (folder / FILE).stat().st_size

    def cut(read_bytes: int, total_bytes: int) -> None:
        with (folder / FILE).open("r+b") as file:
            file.truncate(size // 2)

    with pytest.raises(CheckpointError, match="ends inside"):
        load(folder, on_progress=cut)


def test_a_file_that_goes_away_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    with pytest.raises(CheckpointError, match="Cannot read"):
        load(folder, on_progress=lambda *_: (folder / FILE).unlink(missing_ok=True))


def test_progress_ends_at_all_bytes(model_folder: ModelFolder) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load(model_folder("llama"), on_progress=lambda *bytes_: seen.append(bytes_))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (loaded.nbytes(), loaded.nbytes())


def test_the_memory_of_a_load_holds_each_weight_once(model_folder: ModelFolder) -> None:
    """A converted weight does not keep its full-precision source alive."""
    folder = model_folder("llama")
    recipe = recipe_for(folder, scheme="nf4")
    model = load(folder, replace(recipe)).model
    full = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert full == [model.lm_head]
