"""Properties that hold for every engine: bytes never fall, and the cliff is where it is said."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage import ModelSpec, Recipe, build_plan, default_execution, find_device, resolve
from ullage.planner.engines import ENGINES
from ullage.planner.memory import explain, peak_bytes
from ullage.specs.workload import PHASES, Engine, Workload

DEVICE = find_device("a100-80gb")
MODELS = ("smollm2-135m", "llama-3.1-8b", "gemma-2-9b", "qwen3-30b-a3b", "deepseek-v2-lite")
works = st.builds(Workload, st.integers(1, 20_000), st.integers(1, 2000), st.integers(1, 40))
every_engine = pytest.mark.parametrize("engine", ENGINES)


def recipe(engine: Engine, model: ModelSpec, work: Workload) -> Recipe:
    made = Recipe(model, DEVICE, work, default_execution(DEVICE, engine))
    return ENGINES[engine].settle(made)


@every_engine
@given(st.sampled_from(MODELS), works, works)
@settings(max_examples=40)
def test_bytes_never_fall_as_tokens_and_batch_grow(
    engine: Engine, model: str, work: Workload, more: Workload
) -> None:
    larger = Workload(
        work.prompt_tokens + more.prompt_tokens,
        work.output_tokens + more.output_tokens,
        work.sequences + more.sequences,
    )
    small, large = (peak_bytes(recipe(engine, resolve(model), size)) for size in (work, larger))
    assert large >= small


def with_layers(model: ModelSpec, layers: int) -> ModelSpec:
    """`model` with its first layer's kind of cache in each of `layers`."""
    numbers = tuple(range(layers))
    tensors = tuple(
        replace(tensor, layers=numbers) if tensor.layers else tensor for tensor in model.tensors
    )
    return replace(model, num_layers=layers, caches=model.caches[:1] * layers, tensors=tensors)


@every_engine
@given(works, st.integers(1, 60), st.integers(1, 20))
@settings(max_examples=25)
def test_bytes_never_fall_as_layers_grow(
    engine: Engine, work: Workload, layers: int, more: int
) -> None:
    model = resolve("llama-3.1-8b")
    small, large = (
        peak_bytes(recipe(engine, with_layers(model, count), work))
        for count in (layers, layers + more)
    )
    assert large > small


@every_engine
@given(st.sampled_from(MODELS), works, st.integers(18, 79))
@settings(max_examples=25)
def test_the_cliff_is_the_last_size_that_fits(
    engine: Engine, model: str, work: Workload, budget_gib: int
) -> None:
    made, budget_bytes = recipe(engine, resolve(model), work), budget_gib << 30
    plan = build_plan(made, budget_bytes)
    cliff, limit = plan.cliff, plan.recipe.execution.max_num_seqs

    def fits(**sizes: int) -> bool:
        sized = replace(plan.recipe, workload=replace(work, **sizes))
        if limit is not None:  # a server keeps room for as many as it is told to take at once
            raised = max(limit, sized.workload.sequences)
            sized = replace(sized, execution=replace(sized.execution, max_num_seqs=raised))
        return peak_bytes(sized) <= budget_bytes

    if cliff.max_model_len:
        assert fits(prompt_tokens=cliff.max_model_len - work.output_tokens)
        assert not fits(prompt_tokens=cliff.max_model_len - work.output_tokens + 1)
    if cliff.max_num_seqs:
        assert fits(sequences=cliff.max_num_seqs)
        assert not fits(sequences=cliff.max_num_seqs + 1)


@every_engine
@given(st.sampled_from(MODELS), works)
@settings(max_examples=20)
def test_the_explanation_adds_up(engine: Engine, model: str, work: Workload) -> None:
    made = recipe(engine, resolve(model), work)
    plan = build_plan(made)
    for phase in PHASES:
        lines = explain(plan.recipe, phase)
        assert sum(term.nbytes for term in lines) == plan.phases[phase].total_bytes
        assert all(term.label and term.source for term in lines)
