"""One suite from a recipe to its figures: the model is read once, and both sides share it."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ullage.measure.quality import glue, perplexity, retrieval
from ullage.measure.quality.sides import both_sides
from ullage.measure.quality.suite import Asked, Found, OnStep
from ullage.planner import build_plan
from ullage.runtime.load import attachable, load_model, load_tokenizer
from ullage.specs.evaluation import Suite
from ullage.specs.plan import Recipe

# What a suite makes of its data before any weight is read, and what it does then.
_SUITES: dict[Suite, tuple[Callable[..., Any], Callable[..., Found]]] = {
    "perplexity": (perplexity.prepare, perplexity.measure),
    "glue": (glue.prepare, glue.measure),
    "retrieval": (retrieval.prepare, retrieval.measure),
}


def evaluate(
    suite: Suite,
    inputs: Any,
    dense: Recipe,
    compressed: Recipe,
    folder: Path,
    asked: Asked,
    on_step: OnStep = lambda what, done, total: None,
) -> Found:
    """Measure what the techniques cost that `compressed` has beside those of `dense`, on the
    weights in `folder`, on `inputs` as the suite's reader made them of a folder of data.

    Raises:
        InputError: inputs that are too short for what is asked.
        TechniqueError: a technique that cannot act on this model, or is planned only.
        DoesNotFit: the model and a dense sequence need more memory than the device has.
        CheckpointError: weights that cannot be read.
    """
    attachable(compressed)
    tokenizer = load_tokenizer(folder)
    prepare, measure = _SUITES[suite]
    prepared = prepare(inputs, tokenizer, asked)
    loaded = load_model(build_plan(dense), folder, tokenizer)
    with closing(loaded), both_sides(loaded.model, dense, compressed) as sides:
        return measure(prepared, sides, asked, on_step)
