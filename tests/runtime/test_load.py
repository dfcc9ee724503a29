"""Loading: the weights that are stored, in the format that is planned, or an error of ours."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ullage import Device, Execution, Recipe, TechniqueChoice, Workload, resolve
from ullage.errors import CheckpointError
from ullage.kv import attention
from ullage.planner.memory import phase_footprints
from ullage.runtime.load import TORCH_DTYPES, LoadedModel, load_model, load_tokenizer
from ullage.specs.families import RUNNING
from ullage.specs.sources import read_config
from ullage.units import GIB

ModelFolder = Callable[[str], Path]
FILE = "model.safetensors"


def recipe_for(folder: Path, dtype: str = "fp32", scheme: str = "none") -> Recipe:
    choices = (TechniqueChoice("quantization", {"scheme": scheme}),)
    execution = Execution(dtype=dtype, kv_dtype=dtype)
    device = Device("cpu", "cpu", 64 * GIB)
    return Recipe(resolve(str(folder)), device, Workload(10, 10), execution, choices)


def load(folder: Path, recipe: Recipe | None = None, **arguments: Any) -> LoadedModel:
    return load_model(recipe or recipe_for(folder), folder, load_tokenizer(folder), **arguments)


@pytest.fixture
def copied(tmp_path: Path, model_folder: ModelFolder) -> Callable[[str], Path]:
    """A tiny model's folder of one's own."""
    return lambda family: Path(shutil.copytree(model_folder(family), tmp_path / family))


def edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    weights = load_file(folder / FILE)
    change(weights)
    save_file({name: weight.clone() for name, weight in weights.items()}, folder / FILE)


def assert_same_weights(loaded: LoadedModel, expected: Any, dtype: torch.dtype) -> None:
    ours, theirs = dict(loaded.model.named_parameters()), dict(expected.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == dtype
        assert torch.equal(weight, theirs[name].to(dtype)), name


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", RUNNING)
def test_weights_are_those_of_from_pretrained(
    family: str, dtype: str, model_folder: ModelFolder
) -> None:
    folder = model_folder(family)
    loaded = load(folder, recipe_for(folder, dtype))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_same_weights(loaded, theirs, TORCH_DTYPES[dtype])
    assert not loaded.model.training
    assert loaded.model.config._attn_implementation == attention.NAME


@pytest.mark.parametrize("family", RUNNING)
def test_buffers_are_those_of_from_pretrained(family: str, model_folder: ModelFolder) -> None:
    """Rotary frequencies and embedding scales are computed, not stored."""
    ours = dict(load(model_folder(family)).model.named_buffers())
    theirs = dict(AutoModelForCausalLM.from_pretrained(model_folder(family)).named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(buffer, theirs[name]) for name, buffer in ours.items())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["none", "int8", "nf4"])
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi", "phi3"])
def test_loaded_bytes_are_the_planned_ones(
    family: str, scheme: str, dtype: str, model_folder: ModelFolder
) -> None:
    folder = model_folder(family)
    recipe = recipe_for(folder, dtype, scheme)
    planned_bytes = phase_footprints(recipe)["decode"].weights_bytes
    assert load(folder, recipe).nbytes() == pytest.approx(planned_bytes, rel=0.005)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("scheme", "tolerance"), [("int8", 0.02), ("nf4", 0.3)])
def test_quantized_projections_stay_near_the_weights(
    scheme: str, tolerance: float, dtype: str, model_folder: ModelFolder
) -> None:
    folder = model_folder("llama")
    plain = load(folder, recipe_for(folder, dtype)).model.model.layers[0].mlp.down_proj
    quantized = load(folder, recipe_for(folder, dtype, scheme)).model.model.layers[0].mlp.down_proj
    x = torch.randn(40, 48, generator=torch.Generator().manual_seed(0)).to(TORCH_DTYPES[dtype])
    expected, output = plain(x), quantized(x)
    assert output.dtype == expected.dtype
    assert 0 < (output - expected).norm() < tolerance * expected.norm()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("scheme", ["int8", "nf4"])
def test_a_quantized_model_runs(scheme: str, dtype: str, model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    model = load(folder, recipe_for(folder, dtype, scheme)).model
    model.set_attn_implementation("sdpa")
    for tokens in (1, 40):
        logits = model(torch.ones(1, tokens, dtype=torch.long)).logits
        assert logits.dtype == TORCH_DTYPES[dtype]
        assert torch.isfinite(logits).all()


def test_quantization_leaves_the_head_and_the_embeddings(model_folder: ModelFolder) -> None:
    folder = model_folder("llama")
    model = load(folder, recipe_for(folder, scheme="nf4")).model
    stored = load_file(folder / FILE)
    assert torch.equal(model.lm_head.weight, stored["lm_head.weight"])
    assert torch.equal(model.model.embed_tokens.weight, stored["model.embed_tokens.weight"])
    assert model.model.layers[1].self_attn.q_proj.weight.dtype == torch.uint8


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


def test_a_folder_without_a_tokenizer_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(folder)


def test_progress_ends_at_all_bytes(model_folder: ModelFolder) -> None:
    seen: list[tuple[int, int]] = []
    loaded = load(model_folder("llama"), on_progress=lambda *bytes_: seen.append(bytes_))
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (loaded.nbytes(), loaded.nbytes())


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [(1, 5, {1}), ([1, 7], 5, {1, 7}), (None, 5, {5}), (None, None, set()), (None, [5, 6], {5, 6})],
)
def test_the_end_of_a_text_is_what_the_model_says(
    copied: Callable[[str], Path], generation: Any, config: Any, expected: set[int]
) -> None:
    folder = copied("llama")
    for name, value in (("generation_config.json", generation), ("config.json", config)):
        data = read_config(folder / name)
        (folder / name).write_text(json.dumps({**data, "eos_token_id": value}))
    loaded = load(folder)
    assert loaded.eos_token_ids == expected
    assert loaded.without_end().eos_token_ids == frozenset()


def test_a_folder_without_a_generation_config_ends_as_its_config_says(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("llama")
    (folder / "generation_config.json").unlink()
    assert load(folder).eos_token_ids == {1}


def test_the_memory_of_a_load_holds_each_weight_once(model_folder: ModelFolder) -> None:
    """A converted weight does not keep its full-precision source alive."""
    folder = model_folder("llama")
    recipe = recipe_for(folder, scheme="nf4")
    model = load(folder, replace(recipe)).model
    full = [module for module in model.modules() if type(module) is torch.nn.Linear]
    assert full == [model.lm_head]
