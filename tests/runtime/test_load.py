"""Loading: the weights that are stored, in the format that is planned, or an error of ours."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ullage import (
    Device,
    Execution,
    ModelSpec,
    Recipe,
    TechniqueChoice,
    Workload,
    build_plan,
    resolve,
)
from ullage.errors import BudgetExceeded, CheckpointError, DoesNotFit, TechniqueError
from ullage.kv import attention
from ullage.planner.memory import phase_footprints
from ullage.runtime.load import TORCH_DTYPES, LoadedModel, load_model, load_tokenizer
from ullage.runtime.reader import Reader
from ullage.specs.families import RUNNING
from ullage.specs.footprint import Footprint
from ullage.specs.sources import read_config
from ullage.specs.workload import Step
from ullage.techniques import Technique
from ullage.techniques.quantization.linear import Int8Linear
from ullage.techniques.quantization.settings import Quantization
from ullage.units import GIB, MIB

ModelFolder = Callable[..., Path]
FILE = "model.safetensors"


def recipe_for(folder: Path, dtype: str = "fp32", scheme: str = "none") -> Recipe:
    choices = (TechniqueChoice("quantization", {"scheme": scheme}),)
    execution = Execution(dtype=dtype, kv_dtype=dtype)
    device = Device("cpu", "cpu", 64 * GIB)
    return Recipe(resolve(str(folder)), device, Workload(10, 10), execution, choices)


def load(folder: Path, recipe: Recipe | None = None, **arguments: Any) -> LoadedModel:
    plan = build_plan(recipe or recipe_for(folder))
    return load_model(plan, folder, load_tokenizer(folder), **arguments)


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


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("ullage.runtime.reader._read", read)


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


@dataclass(frozen=True)
class Halving(Technique):
    """Halves what the embedding gives, by a hook."""

    paper: ClassVar[str] = "https://example.org/halving"
    acts_on: ClassVar[Literal["context"]] = "context"
    broken: bool = False

    @property
    def name(self) -> str:
        return "halving"

    @classmethod
    def neutral(cls) -> "Halving":
        return cls()

    def unsupported(self, model: ModelSpec) -> str | None:
        return "it is no llama." if model.family != "llama" else None

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        return before

    @contextmanager
    def attach(self, model: Any) -> Iterator[None]:
        table = model.get_input_embeddings()
        hook = table.register_forward_hook(lambda module, args, output: output / 2)
        try:
            if self.broken:
                raise MemoryError
            yield
        finally:
            hook.remove()


def halving(monkeypatch: pytest.MonkeyPatch, folder: Path, *chain: Technique) -> Recipe:
    """A recipe with techniques that no folder holds."""
    choices = tuple(TechniqueChoice(str(number), {}) for number, _ in enumerate(chain))
    by_name = {choice.name: one for choice, one in zip(choices, chain, strict=True)}
    monkeypatch.setattr("ullage.techniques.create", lambda choice: by_name[choice.name])
    return replace(recipe_for(folder), techniques=choices)


def test_techniques_are_attached_until_the_model_is_closed(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("llama")
    recipe = halving(monkeypatch, folder, Halving(), Quantization(scheme="int8"), Halving())
    loaded = load(folder, recipe)
    table, ids = loaded.model.get_input_embeddings(), torch.tensor([7])
    assert torch.equal(table(ids), table.weight[ids] / 4)
    assert isinstance(loaded.model.model.layers[0].mlp.up_proj, Int8Linear)
    loaded.without_end().close()
    assert torch.equal(table(ids), table.weight[ids])


def test_what_was_attached_goes_when_the_next_cannot_be(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, seen = model_folder("llama"), []
    recipe = halving(monkeypatch, folder, Halving(), Halving(broken=True))
    monkeypatch.setattr(
        "ullage.runtime.load.Reader", lambda model, *_: seen.append(model) or Reader(model, *_)
    )
    with pytest.raises(MemoryError):
        load(folder, recipe)
    assert not seen[0].get_input_embeddings()._forward_hooks


@pytest.mark.parametrize(("family", "runs"), [("qwen2", True), ("llama", False)])
def test_what_cannot_attach_is_refused_before_a_weight_is_read(
    family: str, runs: bool, model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    folder = model_folder(family)
    plan = build_plan(recipe_for(folder))
    monkeypatch.setattr(Halving, "runs", runs)
    recipe = halving(monkeypatch, folder, Halving())
    with pytest.raises(TechniqueError, match="halving cannot act on"):
        load_model(replace(plan, recipe=recipe), folder, load_tokenizer(folder))


def test_a_library_that_is_not_installed_is_missed_before_a_weight_is_read(
    model_folder: ModelFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights(monkeypatch)
    monkeypatch.setitem(sys.modules, "bitsandbytes.nn", None)
    folder = model_folder("llama")
    with pytest.raises(TechniqueError, match=r"ullage\[quant\]"):
        load(folder, recipe_for(folder, scheme="nf4"))


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
