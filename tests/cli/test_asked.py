"""From typed options to a recipe and a workload."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import Device, ModelSpec, find_device, resolve
from ullage.cli.asked import PlanOptions, workload_of
from ullage.errors import InputError, TechniqueError
from ullage.planner.search import Freedom
from ullage.specs.plan import TechniqueChoice
from ullage.specs.workload import Engine, Workload
from ullage.techniques.dms.settings import DMS
from ullage.units import GIB

TinySpec = Callable[..., ModelSpec]
MODEL = resolve("smollm2-135m")
CPU, GPU = Device("a machine", "cpu", 16 * GIB), Device("a card", "cuda", 24 * GIB)
WORK = Workload(100, 10)
NF4 = TechniqueChoice("quantization", {"scheme": "nf4"})


@pytest.mark.parametrize(("device", "dtype"), [(CPU, "fp32"), (GPU, "bf16")])
def test_defaults_are_the_devices(device: Device, dtype: str) -> None:
    recipe = PlanOptions().recipe(MODEL, device, WORK)
    assert recipe.techniques == ()
    assert (recipe.execution.dtype, recipe.execution.kv_dtype) == (dtype, dtype)
    assert recipe.execution.prefill_chunk == 512


def test_kv_entries_follow_the_weights_unless_told_otherwise() -> None:
    followed = PlanOptions(weights="bf16").recipe(MODEL, CPU, WORK).execution
    assert (followed.dtype, followed.kv_dtype) == ("bf16", "bf16")
    told = PlanOptions(weights="bf16", kv_cache_dtype="fp32").recipe(MODEL, CPU, WORK).execution
    assert (told.dtype, told.kv_dtype) == ("bf16", "fp32")


@pytest.mark.parametrize(
    "options", [PlanOptions(weights="nf4"), PlanOptions(technique=("quantization:scheme=nf4",))]
)
def test_a_quantized_format_is_a_technique(options: PlanOptions) -> None:
    recipe = options.recipe(MODEL, CPU, WORK)
    assert recipe.techniques == (NF4,)
    assert recipe.execution.dtype == "fp32"  # of the arithmetic
    assert options.freedom() == Freedom(weights=False)


@pytest.mark.parametrize(
    ("engine", "device", "tokens"),
    [
        ("ullage", "h100", 512), ("llama.cpp", "h100", 512), ("transformers", "h100", 0),
        ("vllm", "rtx-4090", 2048), ("vllm", "h100", 8192),
        ("sglang", "rtx-4090", 4096), ("sglang", "h100", 8192),
    ],
)  # fmt: skip
def test_the_chunk_is_the_engines_as_the_help_says(
    engine: Engine, device: str, tokens: int
) -> None:
    execution = PlanOptions(engine=engine).recipe(MODEL, find_device(device), WORK).execution
    assert execution.prefill_chunk == tokens


def test_transformers_reads_the_prompt_at_once() -> None:
    options = PlanOptions(engine="transformers")
    assert options.recipe(MODEL, CPU, WORK).execution.prefill_chunk == 0
    chunked = PlanOptions(engine="transformers", prefill_chunk=64)
    assert chunked.recipe(MODEL, CPU, WORK).execution.prefill_chunk == 64


def test_what_was_not_asked_for_is_free() -> None:
    assert PlanOptions().freedom() == Freedom()
    asked = PlanOptions(weights="fp32", kv_cache_dtype="fp32", prefill_chunk=0)
    assert asked.freedom() == Freedom(weights=False, kv_dtype=False, prefill_chunk=False)


@pytest.mark.parametrize(
    ("memory", "expected"), [(None, 16 * GIB), ("4GiB", 4 * GIB), ("50%", 8 * GIB)]
)
def test_the_budget_is_inside_the_device(memory: str | None, expected: int) -> None:
    assert PlanOptions(memory=memory).budget_bytes(CPU) == expected


@pytest.mark.parametrize("memory", ["17GiB", "101%", "0", "-1GiB", "12parsecs", ""])
def test_no_budget_is_larger_than_the_device_or_nothing(memory: str) -> None:
    with pytest.raises(InputError):
        PlanOptions(memory=memory).budget_bytes(CPU)


@pytest.mark.parametrize(
    "options",
    [
        PlanOptions(weights="int3"),
        PlanOptions(kv_cache_dtype="fp8", engine="transformers"),
        PlanOptions(kv_cache_dtype="FP8_E5M2"),
        PlanOptions(kv_cache_dtype="int8", engine="transformers"),
        PlanOptions(technique=("quantization", "quantization")),
        PlanOptions(weights="nf4", technique=("quantization:scheme=int8",)),
    ],
)
def test_what_there_is_not_is_an_input_error(options: PlanOptions) -> None:
    with pytest.raises(InputError):
        options.recipe(MODEL, CPU, WORK)


@pytest.mark.parametrize(
    "text", ["wishful", "quantization:bits=4", "quantization:scheme=int3", ":"]
)
def test_an_unknown_technique_or_setting_is_named(text: str) -> None:
    with pytest.raises(TechniqueError):
        PlanOptions(technique=(text,)).recipe(MODEL, CPU, WORK)


def test_the_models_context_is_the_default_length(tiny_spec: TinySpec) -> None:
    assert workload_of(MODEL, None, None, 1) == Workload(8192 - 256, 256)
    assert workload_of(tiny_spec("llama"), None, None, 3) == Workload(128, 128, 3)


@given(st.integers(2, 1 << 20), st.integers(1, 1 << 20))
def test_prompt_and_output_are_the_whole_length(total: int, output: int) -> None:
    if output >= total:
        with pytest.raises(InputError, match="no room"):
            workload_of(MODEL, str(total), str(output), 1)
    else:
        assert workload_of(MODEL, str(total), str(output), 1) == Workload(total - output, output)
    assert workload_of(MODEL, str(total), None, 1).context_tokens == total


def test_the_hybrid_recipe_is_4_bit_weights_and_a_sparse_cache() -> None:
    llama = resolve("llama-3.1-8b")
    recipe = PlanOptions().with_recipe("hybrid", llama).recipe(llama, GPU, WORK)
    assert recipe.techniques[0] == NF4
    assert [choice.name for choice in recipe.techniques] == ["quantization", "dms"]
    assert PlanOptions().with_recipe(None, llama) == PlanOptions()


def test_the_hybrid_recipe_takes_a_shipped_adapter_at_a_quarter_of_the_bytes() -> None:
    smol = resolve("smollm2-135m")
    recipe = PlanOptions().with_recipe("hybrid", smol).recipe(smol, GPU, WORK)
    dms = DMS(**recipe.techniques[1].settings)
    assert dms.adapter == "smollm2-135m"
    dense = smol.num_layers * smol.num_kv_heads * -(-8000 // 16)
    assert 0.23 < dms.held_blocks(smol, 8000) / dense < 0.25


@pytest.mark.parametrize(
    "asked",
    [
        PlanOptions(weights="int8", technique=("dms:kept=0.25",)),
        PlanOptions(technique=("quantization:scheme=int8", "camelot:slots=9")),
    ],
)
def test_what_was_asked_for_stands_beside_the_hybrid_recipe(asked: PlanOptions) -> None:
    assert asked.with_recipe("hybrid", MODEL) == asked
