"""How a search's choice is read."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ullage import ModelSpec, resolve
from ullage.planner.search import describe
from ullage.specs.device import Device
from ullage.specs.gguf_quant import as_gguf
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.quantized import as_checkpoint
from ullage.specs.sources import catalog
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


@pytest.mark.parametrize(
    ("quantization", "weights"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "int4"),
        ({"quant_method": "gptq", "bits": 8, "group_size": -1}, "int8"),
        (None, "fp32"),
    ],
)
def test_description_says_the_format_of_a_quantized_checkpoint(
    tmp_path: Path, quantization: dict[str, Any] | None, weights: str
) -> None:
    config = {**catalog()["llama-3.1-8b"]["config"], "quantization_config": quantization}
    (tmp_path / "config.json").write_text(json.dumps(config))
    recipe = replace(RECIPE, model=resolve(str(tmp_path)))
    assert describe(recipe).startswith(f"{weights} weights, ")
    nf4 = TechniqueChoice("quantization", {"scheme": "nf4"})
    assert describe(replace(recipe, techniques=(nf4,))).startswith("nf4 weights, ")
