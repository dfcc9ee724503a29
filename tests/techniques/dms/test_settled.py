"""A budget of bytes in the place of `kept`: the most that is inside it, and never more."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import (
    Execution,
    ModelSpec,
    Recipe,
    Workload,
    build_plan,
    find_device,
    fit_run,
    resolve,
)
from ullage.errors import TechniqueError
from ullage.planner.explore import best_plan, cheapest_change, explore
from ullage.planner.search import Freedom
from ullage.specs.blocks import block_bytes
from ullage.specs.families import spec_from_config
from ullage.techniques import as_typed, choice_of, create, parse
from ullage.techniques.dms.adapter import DECIDED_TOKENS, Adapter
from ullage.techniques.dms.budget import KEPT_STEPS
from ullage.techniques.dms.settings import DMS
from ullage.units import GIB, KIB, MIB, parse_bytes

TinyModel = Callable[..., tuple[Any, ModelSpec]]
SMOLLM2 = resolve("smollm2-135m")
FP32 = Execution(dtype="fp32", kv_dtype="fp32")
WORK = Workload(3840, 256)
FREEDOM = Freedom(sparsity=False)


def entries_bytes(technique: DMS, spec: ModelSpec, tokens: int, kv_dtype: str) -> int:
    return technique.held_blocks(spec, tokens) * block_bytes(spec, kv_dtype)


def recipe(budget: str, work: Workload = WORK, execution: Execution = FP32) -> Recipe:
    choice = choice_of(DMS(budget=budget, window=256))
    return Recipe(SMOLLM2, find_device("cpu-16gb"), work, execution, (choice,))


def dms_of(settled: Recipe) -> DMS:
    technique = create(settled.techniques[-1])
    assert isinstance(technique, DMS)
    return technique


def inside(settled: Recipe, budget_bytes: int) -> bool:
    tokens, kv_dtype = settled.workload.context_tokens, settled.execution.kv_dtype
    return entries_bytes(dms_of(settled), SMOLLM2, tokens, kv_dtype) <= budget_bytes


@st.composite
def specs(draw: st.DrawFn) -> ModelSpec:
    heads = draw(st.integers(1, 4))
    config = {
        "model_type": "llama",
        "vocab_size": 64,
        "hidden_size": heads * 2 * (head_dim := draw(st.sampled_from([8, 64]))),
        "intermediate_size": 48,
        "num_hidden_layers": draw(st.integers(1, 5)),
        "num_attention_heads": heads * 2,
        "num_key_value_heads": heads,
        "head_dim": head_dim,
        "max_position_embeddings": 1 << 17,
    }
    return spec_from_config(config, name="drawn")


def check_budget(technique: DMS, spec: ModelSpec, tokens: int, kv_dtype: str) -> None:
    """The most that is inside, or an error that names a budget which is the least that works."""
    budget_bytes = parse_bytes(technique.budget)
    work, execution = Workload(tokens - 1, 1), Execution(dtype="fp32", kv_dtype=kv_dtype)
    try:
        found = technique.settled(spec, work, execution)
    except TechniqueError as error:
        least = str(error).removesuffix(".").split()[-1]
        assert parse_bytes(least) > budget_bytes
        assert replace(technique, budget=least).settled(spec, work, execution).kept > 0
        if parse_bytes(least) > KIB:
            below = replace(technique, budget=f"{parse_bytes(least) - KIB}B")
            with pytest.raises(TechniqueError):
                below.settled(spec, work, execution)
        return
    assert replace(found, kept=DMS.kept, budget=technique.budget) == technique
    assert entries_bytes(found, spec, tokens, kv_dtype) <= budget_bytes
    if found.kept < 1:
        more = replace(found, kept=round(found.kept * KEPT_STEPS + 1) / KEPT_STEPS)
        assert entries_bytes(more, spec, tokens, kv_dtype) > budget_bytes


@given(
    specs(),
    st.integers(1, 2000),
    st.integers(2, 1 << 17),
    st.floats(0.0, 1.2),
    st.sampled_from(["fp32", "bf16", "int8"]),
)
def test_the_most_is_kept_that_is_inside(
    spec: ModelSpec, window: int, tokens: int, share: float, kv_dtype: str
) -> None:
    dense_bytes = entries_bytes(DMS.neutral(), spec, tokens, kv_dtype)
    technique = DMS(window=window, budget=f"{max(1, int(share * dense_bytes))}B")
    check_budget(technique, spec, tokens, kv_dtype)


@pytest.mark.parametrize("predictor", ["expected-attention", "dms"])
@pytest.mark.parametrize("share", [0.05, 0.13, 0.3, 0.9, 0.999, 1.0])
def test_heads_that_share_are_inside_together(
    tmp_path: Path, tiny_spec: Callable[..., ModelSpec], predictor: Any, share: float
) -> None:
    spec = tiny_spec("llama", max_position_embeddings=4096)
    loss = numpy.array([[[9, 5, 1], [3, 2, 1]], [[7, 2, 0.5], [1, 0.5, 0.1]]], numpy.float32)
    captured = numpy.broadcast_to(numpy.linspace(0.3, 1, DECIDED_TOKENS), (2, 2, DECIDED_TOKENS))
    learned = {"dms": numpy.ones((2, 2, spec.hidden_size), numpy.float32)}
    adapter = tmp_path / "mine.safetensors"
    Adapter((16, 64, 256), loss, captured, 8, "of nobody", {}, learned).save(adapter)
    budget_bytes = int(share * entries_bytes(DMS.neutral(), spec, 3000, "fp32"))
    settings = {"adapter": str(adapter), "budget": f"{budget_bytes}B"}
    technique = DMS(window=100, predictor=predictor, **settings)
    found = technique.settled(spec, Workload(2999, 1), FP32)
    held_bytes = entries_bytes(found, spec, 3000, "fp32")
    assert 0.7 * budget_bytes < held_bytes <= budget_bytes


def test_a_budget_for_everything_keeps_everything() -> None:
    dense_bytes = entries_bytes(DMS.neutral(), SMOLLM2, 4096, "fp32")
    assert DMS(budget=f"{dense_bytes}B").settled(SMOLLM2, WORK, FP32).kept == 1
    assert DMS(budget=f"{dense_bytes - 1}B").settled(SMOLLM2, WORK, FP32).kept < 1


@pytest.mark.parametrize(
    "settings",
    [
        {"budget": "64MiB", "kept": 0.25},
        {"budget": "64MiB", "kept": 0.5},
        {"budget": "64MiB", "kept": 1.0},
        {"budget": "64MiB", "predictor": "window"},
        {"budget": "12parsecs"},
        {"budget": "80%"},
        {"budget": "0MiB"},
        {"budget": 1 << 26},
    ],
)
def test_budgets_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(TechniqueError, match=r"^dms: "):
        DMS(**settings)


def test_what_is_kept_is_a_half_where_nothing_says() -> None:
    assert DMS() == DMS(kept=0.5) == DMS(None)
    assert DMS(budget="64MiB").kept is None
    assert as_typed(choice_of(DMS(budget="64MiB"))).startswith("dms:window=512,")
    assert (
        parse("dms:budget=64MiB") == DMS(budget="64MiB") == create(choice_of(DMS(budget="64MiB")))
    )


def test_without_a_length_there_is_no_saying_what_is_kept(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    technique = DMS(budget="64MiB")
    with pytest.raises(TechniqueError, match="settle it"), technique.attach(model):
        pass
    with pytest.raises(TechniqueError, match="settle it"):
        technique.held_blocks(spec, 100)
    assert not model._forward_pre_hooks


def test_a_plan_and_a_run_hold_what_was_settled() -> None:
    asked = recipe("64MiB")
    plan = build_plan(asked)
    settled = DMS(budget="64MiB", window=256).settled(SMOLLM2, WORK, FP32)
    assert dms_of(plan.recipe) == settled
    assert 0 < settled.kept < 1
    assert fit_run(asked, 8 * GIB, FREEDOM).recipe == plan.recipe
    longer = replace(plan.recipe, workload=Workload(7000, 256))
    assert dms_of(build_plan(longer).recipe) == settled  # a plan file says kept


def test_what_is_bad_for_a_model_goes_before_what_is_bad_for_a_length() -> None:
    mistral = replace(recipe("1KiB"), model=resolve("mistral-7b-v0.1"))
    with pytest.raises(TechniqueError, match="cannot act on"):
        build_plan(mistral)
    with pytest.raises(TechniqueError, match="cannot act on"):
        DMS(budget="1KiB").settled(mistral.model, WORK, FP32)
    elsewhere = Execution("llama.cpp", "fp16", "q8_0", "flash")
    with pytest.raises(TechniqueError, match="a technique of ullage"):
        build_plan(recipe("64MiB", execution=elsewhere))


def test_a_search_stays_inside_at_the_length_that_it_reaches() -> None:
    """Where everything would be kept at the asked length, and nothing is refused but by bytes."""
    asked = recipe("48MiB", Workload(768, 256))
    assert dms_of(build_plan(asked).recipe).kept == 1
    explored = explore(asked, GIB, "context", FREEDOM)
    plan = best_plan(explored)
    assert plan is not None
    assert plan.recipe.workload.context_tokens > 2048
    for found in explored.ranked:
        assert found.reach is not None
        work = Workload(found.reach - 256, 256)
        reached = build_plan(replace(found.recipe, workload=work), GIB)
        assert reached.fits
        assert inside(reached.recipe, 48 * MIB)


def test_a_search_refuses_what_a_plan_does() -> None:
    asked = recipe("1MiB")
    with pytest.raises(TechniqueError, match="below the window"):
        explore(asked, GIB, "context", FREEDOM)
    with pytest.raises(TechniqueError, match="below the window"):
        cheapest_change(asked, GIB, FREEDOM)
