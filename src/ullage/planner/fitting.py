"""What `ullage run` changes so that a request fits: the least loss of quality first."""

from dataclasses import dataclass, replace

from ullage import techniques
from ullage.errors import DoesNotFit, TechniqueError
from ullage.planner.build import settle
from ullage.planner.levers import Lever, combinations, levers_of
from ullage.planner.memory import peak_bytes
from ullage.planner.search import Freedom, as_memory_option
from ullage.specs.calibration import Calibration
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.plan import Recipe
from ullage.units import format_bytes

# What a run may move. Of these the last moves first: a smaller chunk only costs time, KV entries
# lose less than weights. Unlike a search's, the order asks for no figures of quality or speed; so
# of KV formats those alone are moved to that are plain.
_MOVED = ("weights", "KV entries", "chunk")


@dataclass(frozen=True)
class Choice:
    """The recipe that fits and what its peak is, in bytes."""

    recipe: Recipe
    peak_bytes: int


def fit_run(
    recipe: Recipe,
    budget_bytes: int,
    freedom: Freedom,
    calibration: Calibration | None = None,
) -> Choice:
    """The first variant of `recipe`, from least to most loss, whose peak is inside `budget_bytes`.

    Raises:
        TechniqueError: a technique that can only be planned, or that does not support the model.
        DoesNotFit: none fits; carries the smallest budget that would.
    """
    _refuse_planned_only(recipe)
    recipe = settle(recipe)  # or refuses it, before a larger budget is asked for
    smallest_bytes = None
    for variant, _ in combinations(recipe, _levers(recipe, freedom)):
        variant_bytes = peak_bytes(variant, calibration)
        if variant_bytes <= budget_bytes:
            return Choice(variant, variant_bytes)
        smallest_bytes = min(smallest_bytes or variant_bytes, variant_bytes)
    assert smallest_bytes is not None  # there is always the recipe itself
    work = recipe.workload
    raise DoesNotFit(
        f"{recipe.model.name} with {work.prompt_tokens:,} + {work.output_tokens:,} tokens does not "
        f"fit in {format_bytes(budget_bytes)}: the smallest budget that works is "
        f"{as_memory_option(smallest_bytes)}.",
        needed_bytes=smallest_bytes,
    )


def _refuse_planned_only(recipe: Recipe) -> None:
    for choice in recipe.techniques:
        if not techniques.create(choice).runs:
            raise TechniqueError(f"{choice.name} can be planned, and is not run yet: leave it out.")


def _levers(recipe: Recipe, freedom: Freedom) -> list[Lever]:
    """Those that a run may move."""
    return [
        replace(
            lever,
            settings=tuple(
                setting for setting in lever.settings if _moves_to(setting.apply(recipe), recipe)
            ),
        )
        for lever in levers_of(recipe, freedom)
        if lever.name in _MOVED
    ]


def _moves_to(changed: Recipe, asked: Recipe) -> bool:
    """Whether a run may. The arithmetic stays what it was: many CPUs are slow in bf16."""
    execution, kv_dtype = changed.execution, changed.execution.kv_dtype
    plain = kv_dtype in DTYPE_BYTES or kv_dtype == asked.execution.kv_dtype
    return plain and execution.dtype == asked.execution.dtype
