"""The bytes of each phase: an engine's terms, then the techniques in their order."""

from dataclasses import replace

from ullage import techniques
from ullage.planner.constants import Constants
from ullage.planner.engines import ENGINES
from ullage.specs.calibration import Calibration
from ullage.specs.footprint import Footprint, Part, Term
from ullage.specs.plan import Recipe
from ullage.specs.workload import PHASES, PhaseName, Workload

_FAR_TOKENS = 1 << 20
_PARTS: tuple[Part, ...] = ("weights", "kv", "activation", "logits", "overhead")


def phase_footprints(
    recipe: Recipe,
    calibration: Calibration | None = None,
    phases: tuple[PhaseName, ...] = PHASES,
) -> dict[PhaseName, Footprint]:
    """The peak of each of `phases` on the fullest device, all techniques applied."""
    engine, constants = ENGINES[recipe.execution.engine], Constants(recipe, calibration)
    chain = [techniques.create(choice) for choice in recipe.techniques]
    footprints: dict[PhaseName, Footprint] = {}
    for phase in phases:
        step = engine.step(recipe, phase)
        footprint = Footprint.of(engine.terms(recipe, step, constants))
        for technique in chain:
            footprint = technique.footprint(footprint, recipe.model, step)
        footprints[phase] = footprint
    return footprints


def peak_bytes(recipe: Recipe, calibration: Calibration | None = None) -> int:
    """The largest phase's total."""
    return max(part.total_bytes for part in phase_footprints(recipe, calibration).values())


def serving_bytes(recipe: Recipe, calibration: Calibration | None = None) -> int:
    """The larger total of prefill and decode: loading takes the same whatever the work."""
    phases = phase_footprints(recipe, calibration, ("prefill", "decode"))
    return max(part.total_bytes for part in phases.values())


def explain(recipe: Recipe, phase: PhaseName, calibration: Calibration | None = None) -> list[Term]:
    """Every line of a phase's sum: the engine's, then what each technique adds or takes away."""
    engine = ENGINES[recipe.execution.engine]
    step = engine.step(recipe, phase)
    lines = engine.terms(recipe, step, Constants(recipe, calibration))
    footprint = Footprint.of(lines)
    for choice in recipe.techniques:
        technique = techniques.create(choice)
        after = technique.footprint(footprint, recipe.model, step)
        lines += _differences(footprint, after, choice.name, technique.paper)
        footprint = after
    return lines


def _differences(before: Footprint, after: Footprint, name: str, paper: str) -> list[Term]:
    terms = []
    for part in _PARTS:
        change = getattr(after, f"{part}_bytes") - getattr(before, f"{part}_bytes")
        if change:
            terms.append(Term(part, name, change, "exact", paper))
    return terms


def kv_bytes_per_token(recipe: Recipe) -> int:
    """Bytes that each further token of one sequence adds: the layers without a window, or all where
    every layer slides."""
    if any(choice.name != "quantization" for choice in recipe.techniques):
        return _slope(recipe)
    model = recipe.model
    growing = [kind for kind in model.cache_kinds if kind[0].window is None and kind[0].width]
    engine, kv_dtype = ENGINES[recipe.execution.engine], recipe.execution.kv_dtype
    kinds = growing or model.cache_kinds
    return int(
        sum(count * engine.token_bytes(model, cache.width, kv_dtype) for cache, count in kinds)
    )


def _slope(recipe: Recipe) -> int:
    """How the KV entries of one sequence grow, far from where windows and banks fill."""
    short, long = (
        phase_footprints(replace(recipe, workload=Workload(tokens, 1)))["decode"].kv_bytes
        for tokens in (_FAR_TOKENS, 2 * _FAR_TOKENS)
    )
    return round((long - short) / _FAR_TOKENS)
