"""What `ullage run` gives up so that a request fits, and in which order."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import DoesNotFit, ModelSpec, fit_run, resolve
from ullage.errors import TechniqueError
from ullage.planner.fitting import Choice
from ullage.planner.levers import CHUNKS as ALL_CHUNKS
from ullage.planner.memory import peak_bytes
from ullage.planner.search import Freedom
from ullage.specs.device import Device
from ullage.specs.model import Storage
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.quality import Quality
from ullage.specs.workload import Execution, Workload
from ullage.units import GIB, MIB, parse_bytes

CPU = Device("cpu", "cpu", 64 * GIB)
FP32 = Execution(dtype="fp32", kv_dtype="fp32")
MODEL = resolve("smollm2-135m")
RECIPE = Recipe(MODEL, CPU, Workload(4000, 200), FP32)
ALL_FREE = Freedom()
SCHEMES = ("none", "int8", "nf4")  # in the order of their loss
CHUNKS = tuple(chunk for chunk in ALL_CHUNKS if chunk <= RECIPE.execution.prefill_chunk)
freedoms = st.builds(Freedom, st.booleans(), st.booleans(), st.booleans())


def scheme_of(recipe: Recipe) -> str:
    for choice in recipe.techniques:
        if choice.name == "quantization":
            return str(choice.settings["scheme"])
    return "none"


def variant(scheme: str, kv_dtype: str, chunk: int) -> Recipe:
    techniques = () if scheme == "none" else (TechniqueChoice("quantization", {"scheme": scheme}),)
    execution = replace(FP32, kv_dtype=kv_dtype, prefill_chunk=chunk)
    return replace(RECIPE, execution=execution, techniques=techniques)


PEAKS = {key: peak_bytes(variant(*key)) for key in product(SCHEMES, ("fp32", "bf16"), CHUNKS)}
budgets = st.integers(min(PEAKS.values()), max(PEAKS.values()))


def test_nothing_changes_when_everything_fits() -> None:
    chosen = fit_run(RECIPE, 64 * GIB, ALL_FREE).recipe
    assert (scheme_of(chosen), chosen.execution) == ("none", FP32)


@pytest.mark.parametrize("budget_bytes", [1, 64 * GIB])
def test_what_no_budget_would_run_is_refused_whatever_the_budget(budget_bytes: int) -> None:
    sliding = replace(RECIPE, model=resolve("mistral-7b-v0.1"))
    with pytest.raises(TechniqueError, match="dms cannot act on mistral"):
        fit_run(replace(sliding, techniques=(TechniqueChoice("dms", {}),)), budget_bytes, ALL_FREE)


@given(budgets)
def test_weights_change_last_and_the_chunk_first(budget_bytes: int) -> None:
    choice = fit_run(RECIPE, budget_bytes, ALL_FREE)
    execution, scheme = choice.recipe.execution, scheme_of(choice.recipe)
    assert choice.peak_bytes == peak_bytes(choice.recipe) <= budget_bytes

    def none_fits(schemes: tuple[str, ...], kv_dtypes: tuple[str, ...]) -> bool:
        return all(
            PEAKS[key] > budget_bytes for key in PEAKS if key[0] in schemes and key[1] in kv_dtypes
        )

    assert none_fits(SCHEMES[: SCHEMES.index(scheme)], ("fp32", "bf16"))
    if execution.kv_dtype != "fp32":
        assert none_fits((scheme,), ("fp32",))
    larger = [chunk for chunk in CHUNKS if chunk > execution.prefill_chunk]
    assert all(PEAKS[scheme, execution.kv_dtype, chunk] > budget_bytes for chunk in larger)


def test_each_step_is_taken_by_some_budget() -> None:
    steps = {
        (scheme_of(choice.recipe), choice.recipe.execution.kv_dtype)
        for choice in (fit_run(RECIPE, peak, ALL_FREE) for peak in PEAKS.values())
    }
    assert {("none", "fp32"), ("none", "bf16"), ("int8", "fp32")} <= steps
    chunks = {
        fit_run(RECIPE, peak, ALL_FREE).recipe.execution.prefill_chunk for peak in PEAKS.values()
    }
    assert {512, 32} <= chunks


@given(st.integers(1, max(PEAKS.values())), freedoms)
def test_what_the_user_chose_stays(budget_bytes: int, freedom: Freedom) -> None:
    asked = variant("int8", "fp32", 300)
    try:
        chosen = fit_run(asked, budget_bytes, freedom).recipe
    except DoesNotFit:
        return  # another test asks whether it had to be
    assert freedom.weights or chosen.techniques == asked.techniques
    assert freedom.kv_dtype or chosen.execution.kv_dtype == "fp32"
    assert freedom.prefill_chunk or chosen.execution.prefill_chunk == 300
    assert (chosen.workload, chosen.model) == (asked.workload, asked.model)


@given(freedoms)
def test_the_needed_bytes_are_the_smallest_budget_that_works(freedom: Freedom) -> None:
    with pytest.raises(DoesNotFit) as refused:
        fit_run(RECIPE, 1, freedom)
    needed_bytes = refused.value.needed_bytes
    assert fit_run(RECIPE, needed_bytes, freedom).peak_bytes == needed_bytes
    with pytest.raises(DoesNotFit):
        fit_run(RECIPE, needed_bytes - 1, freedom)


def test_the_message_names_a_budget_that_works() -> None:
    with pytest.raises(DoesNotFit) as refused:
        fit_run(RECIPE, 100 * MIB, ALL_FREE)
    advice = re.search(r"--memory (\S+?)\.", str(refused.value))
    assert advice is not None
    assert isinstance(fit_run(RECIPE, parse_bytes(advice[1]), ALL_FREE), Choice)


def test_bf16_arithmetic_keeps_its_kv_format() -> None:
    bf16 = replace(RECIPE, execution=Execution())
    for budget_bytes in PEAKS.values():
        try:
            chosen = fit_run(bf16, budget_bytes, ALL_FREE).recipe
        except DoesNotFit:
            continue
        assert chosen.execution.kv_dtype == chosen.execution.dtype == "bf16"


@pytest.mark.parametrize("cost", [None, 0.1])
def test_a_run_moves_to_int8_entries_never_and_keeps_those_that_were_asked_for(
    cost: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a search would, since there is a figure of what they cost, or not."""
    known = cost and Quality("kv", "int8", "m", 10, "perplexity %", cost, 8, "measured", "ours")
    monkeypatch.setattr("ullage.planner.costs.find", lambda *_: known)
    with pytest.raises(DoesNotFit) as refused:
        fit_run(RECIPE, 1, ALL_FREE)
    assert refused.value.needed_bytes == min(PEAKS.values())
    asked = replace(RECIPE, execution=replace(FP32, kv_dtype="int8"))
    with pytest.raises(DoesNotFit) as refused:
        fit_run(asked, 1, ALL_FREE)
    least_bytes = refused.value.needed_bytes
    assert least_bytes < min(PEAKS.values())
    assert fit_run(asked, least_bytes, ALL_FREE).recipe.execution.kv_dtype == "int8"


def test_a_model_that_no_quantizer_converts_keeps_its_weights(
    tiny_spec: Callable[..., ModelSpec],
) -> None:
    gpt2 = replace(RECIPE, model=tiny_spec("gpt2"))
    with pytest.raises(DoesNotFit) as refused:
        fit_run(gpt2, 1, ALL_FREE)
    chosen = fit_run(gpt2, refused.value.needed_bytes, ALL_FREE).recipe
    assert chosen.techniques == ()


def test_a_quantized_checkpoint_is_not_quantized_again() -> None:
    int4 = Storage("w4a16", 4, 1, 128, 2.5)
    tensors = tuple(
        replace(tensor, storage=int4) if tensor.role == "linear" else tensor
        for tensor in MODEL.tensors
    )
    packed = replace(RECIPE, model=replace(MODEL, tensors=tensors))
    with pytest.raises(DoesNotFit) as refused:
        fit_run(packed, 1, ALL_FREE)
    chosen = fit_run(packed, refused.value.needed_bytes, ALL_FREE).recipe
    assert chosen.techniques == ()
    assert chosen.execution.prefill_chunk == min(CHUNKS)


@pytest.mark.parametrize(("asked", "tried"), [(512, 512), (200, 200), (2048, 2048), (0, 0)])
def test_the_recipes_own_chunk_is_tried_first(asked: int, tried: int) -> None:
    recipe = replace(RECIPE, execution=replace(FP32, prefill_chunk=asked))
    chosen = fit_run(recipe, 64 * GIB, ALL_FREE).recipe
    assert chosen.execution.prefill_chunk == tried
    tight = fit_run(recipe, chosen_peak(asked) - 1, ALL_FREE).recipe
    assert tight.execution.prefill_chunk < (asked or 8000)


def chosen_peak(chunk: int) -> int:
    return peak_bytes(replace(RECIPE, execution=replace(FP32, prefill_chunk=chunk)))
