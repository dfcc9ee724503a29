"""How the tests of loading load, and what they expect of a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ullage import Device, Execution, Recipe, TechniqueChoice, Workload, build_plan, resolve
from ullage.runtime.load import LoadedModel, load_model, load_tokenizer
from ullage.units import GIB

FILE = "model.safetensors"


def recipe_for(folder: Path, dtype: str = "fp32", scheme: str = "none") -> Recipe:
    choices = (TechniqueChoice("quantization", {"scheme": scheme}),)
    execution = Execution(dtype=dtype, kv_dtype=dtype)
    device = Device("cpu", "cpu", 64 * GIB)
    return Recipe(resolve(str(folder)), device, Workload(10, 10), execution, choices)


def load(folder: Path, recipe: Recipe | None = None, **arguments: Any) -> LoadedModel:
    plan = build_plan(recipe or recipe_for(folder))
    return load_model(plan, folder, load_tokenizer(folder), **arguments)


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


def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(tensor: Any) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr("ullage.runtime.reader._read", read)
