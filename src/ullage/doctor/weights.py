"""The model of a log's run, with its weights in the format that the log states. Nothing outside of
the catalog is read."""

import re

from ullage.errors import InputError
from ullage.planner.engines import ENGINES
from ullage.specs.dtypes import dtype_name
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.sources import from_catalog

# What names of quantized checkpoints add to that of the model.
_ADDED = re.compile(
    r"(?:[-_.](?:awq|gptq|fp8|nvfp4|mxfp4|bnb|quantized|w\d\d?a\d\d?|g\d{2,3}|int[48]|[48]-?bit"
    r"|dynamic))+$",
    re.IGNORECASE | re.ASCII,
)
# Methods of one format each, by the engines' names of them.
_FORMATS = {
    "awq": "int4", "awq_marlin": "int4", "auto_awq": "int4",
    "fbgemm_fp8": "fp8", "modelopt_fp4": "nvfp4", "gpt_oss_mxfp4": "mxfp4", "bitsandbytes": "nf4",
}  # fmt: skip
# Methods of several formats, and what in a checkpoint's name tells which.
_SEVERAL = (
    "compressed-tensors", "gptq", "gptq_marlin", "auto_gptq", "auto-round", "modelopt", "moe_wna16",
)  # fmt: skip
_NAMED = (
    ("mxfp4", re.compile(r"mxfp4", re.IGNORECASE)),
    ("nvfp4", re.compile(r"fp4", re.IGNORECASE)),
    ("fp8", re.compile(r"fp8", re.IGNORECASE)),
    ("int4", re.compile(r"w4a16|int4|4-?bit", re.IGNORECASE)),
    ("int8", re.compile(r"w8a8|w8a16|int8|8-?bit", re.IGNORECASE)),
)


def model_of(name: str, quantization: str) -> ModelSpec | None:
    """The catalog's checkpoint of that name, or, if its weights are quantized, the plain model that
    it was made of."""
    name = name.strip().replace(" ", "-")  # GGUF's names have blanks
    found = from_catalog(name)
    if found is not None or not quantization:
        return found
    return from_catalog(_ADDED.sub("", name.rpartition("/")[2]))


def with_weights(recipe: Recipe, quantization: str, name: str) -> Recipe:
    """`recipe` with its weights as the log has them: the checkpoint called `name`, by the method
    `quantization`, "" for none.

    Raises:
        InputError: a format that is not known, or that has no arithmetic here.
    """
    engine = ENGINES[recipe.execution.engine]
    if not quantization or (recipe.model.prequantized and not engine.converts):
        return recipe
    weights = _format(quantization, name)
    if weights not in engine.weights:
        raise InputError(
            f"there is no arithmetic for {weights[:40]} weights in {recipe.execution.engine}."
        )
    return engine.with_weights(recipe, weights)


def _format(quantization: str, name: str) -> str:
    if quantization not in _SEVERAL:
        return _FORMATS.get(quantization) or dtype_name(quantization) or quantization
    for weights, pattern in _NAMED:
        if pattern.search(name):
            return weights
    raise InputError(
        f"{quantization} has several formats of weights, and neither the log nor the model's name "
        "says which."
    )
