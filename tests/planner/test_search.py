"""How a search's choice is read."""

from dataclasses import replace

import pytest

from ullage import ModelSpec, resolve
from ullage.planner.search import describe
from ullage.specs.device import Device
from ullage.specs.gguf_quant import as_gguf
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.quantized import as_checkpoint
from ullage.specs.workload import Execution, Workload
from ullage.units import GIB

MODEL = resolve("smollm2-135m")
FP32 = Execution(dtype="fp32", kv_dtype="fp32")
RECIPE = Recipe(MODEL, Device("cpu", "cpu", 64 * GIB), Workload(4000, 200), FP32)


def test_description_says_what_was_chosen() -> None:
    made = replace(
        RECIPE,
        execution=replace(FP32, kv_dtype="bf16", prefill_chunk=64),
        techniques=(TechniqueChoice("quantization", {"scheme": "nf4"}),),
    )
    text = describe(made)
    assert text == "nf4 weights, bf16 KV, sdpa attention, prompt in chunks of 64"
    assert "fp32 weights" in describe(RECIPE)
    assert "in one pass" in describe(replace(RECIPE, execution=replace(FP32, prefill_chunk=0)))


@pytest.mark.parametrize(
    ("model", "weights"),
    [(as_gguf(MODEL, "q4_k_m"), "q4_k_m"), (as_checkpoint(MODEL, "fp8"), "fp8")],
)
def test_description_says_the_format_that_the_model_was_given(
    model: ModelSpec, weights: str
) -> None:
    assert describe(replace(RECIPE, model=model)).startswith(f"{weights} weights, ")
