"""Loading: the model that is planned, in the format that is planned, or an error of ours."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from load_cases import FILE, assert_same_weights, load, no_weights, recipe_for
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ullage import build_plan
from ullage.errors import BudgetExceeded, CheckpointError, DoesNotFit
from ullage.kv import attention
from ullage.planner.memory import phase_footprints
from ullage.runtime.load import TORCH_DTYPES, load_model, load_tokenizer
from ullage.specs.families import RUNNING
from ullage.specs.sources import read_config
from ullage.units import GIB, MIB

ModelFolder = Callable[..., Path]


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


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", RUNNING)
def test_buffers_are_those_of_from_pretrained(
    family: str, stored: str, dtype: str, model_folder: ModelFolder
) -> None:
    """Rotary frequencies and embedding scales are computed, not stored, and not rounded to what the
    checkpoint is stored in."""
    folder = model_folder(family, stored)
    ours = dict(load(folder, recipe_for(folder, dtype)).model.named_buffers())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=TORCH_DTYPES[dtype])
    assert ours.keys() == dict(theirs.named_buffers()).keys()
    for name, buffer in theirs.named_buffers():
        assert torch.equal(ours[name], buffer), name


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


def test_a_folder_without_a_tokenizer_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("llama")
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        load_tokenizer(folder)


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_tokenizer_that_is_code_is_refused_and_never_run(
    answer: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor is anybody asked whether to."""
    folder = copied("llama")
    ran = folder / "ran"
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    config = read_config(folder / "tokenizer_config.json")
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: answer)
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        load_tokenizer(folder)
    assert not ran.exists()


@pytest.mark.parametrize("answer", ["y", "n"])
def test_a_models_own_code_is_never_run(
    answer: str, copied: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = copied("llama")
    ran, recipe = folder / "ran", recipe_for(folder)
    (folder / "evil.py").write_text(f"open({str(ran)!r}, 'w')\nclass Evil: pass\n")
    for name in ("AutoConfig", "AutoModelForCausalLM"):
        config = {**read_config(folder / "config.json"), "auto_map": {name: "evil.Evil"}}
        (folder / "config.json").write_text(json.dumps(config))
        monkeypatch.setattr("builtins.input", lambda *_: answer)
        load(folder, recipe)  # as the class that transformers itself has
        assert not ran.exists()


def test_a_plan_that_does_not_fit_is_refused_before_a_weight_is_read(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    folder = model_folder("llama")
    plan = build_plan(recipe_for(folder))
    with pytest.raises(DoesNotFit):
        load_model(replace(plan, budget_bytes=10 * MIB), folder, load_tokenizer(folder))


def test_a_process_without_room_is_refused_before_a_weight_is_read(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    monkeypatch.setattr("ullage.runtime.load.held_bytes", lambda _: 64 * GIB - 10)
    with pytest.raises(BudgetExceeded, match="load phase"):
        load(model_folder("llama"))


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
