"""Loading with techniques: attached until the model is closed, or refused before it is read."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
import torch
from load_cases import load, no_weights, recipe_for

from ullage import ModelSpec, Recipe, TechniqueChoice, build_plan
from ullage.errors import TechniqueError
from ullage.runtime.load import load_model, load_tokenizer
from ullage.runtime.reader import Reader
from ullage.specs.footprint import Footprint
from ullage.specs.workload import Step
from ullage.techniques import Technique
from ullage.techniques.quantization.linear import Int8Linear
from ullage.techniques.quantization.settings import Quantization

ModelFolder = Callable[..., Path]


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
