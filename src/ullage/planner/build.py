"""From a recipe and a budget to a Plan."""

from ullage import techniques
from ullage.errors import TechniqueError
from ullage.planner.cliff import find_cliff
from ullage.planner.constants import Constants
from ullage.planner.engines import ENGINES
from ullage.planner.engines.base import Planned
from ullage.planner.latency import estimate
from ullage.planner.memory import kv_bytes_per_token, phase_footprints
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device
from ullage.specs.plan import Plan, Recipe
from ullage.specs.workload import Engine, Execution


def build_plan(
    recipe: Recipe, budget_bytes: int | None = None, calibration: Calibration | None = None
) -> Plan:
    """The plan of `recipe` inside `budget_bytes` (default: what the engine takes of the device).

    Raises:
        TechniqueError: a technique that does not support the model, or cannot be settled.
        InputError: something that the engine does not have.
    """
    recipe = settle(recipe)
    engine = ENGINES[recipe.execution.engine]
    budget_bytes = budget_bytes or engine.limit_bytes(recipe)
    recipe = engine.within(recipe, budget_bytes)
    phases = phase_footprints(recipe, calibration)
    planned = Planned(recipe, phases, budget_bytes, Constants(recipe, calibration))
    return Plan(
        recipe=recipe,
        budget_bytes=budget_bytes,
        phases=phases,
        share=engine.share(planned),
        cliff=find_cliff(recipe, budget_bytes, calibration),
        kv_bytes_per_token=kv_bytes_per_token(recipe),
        latency=estimate(recipe, phases),
    )


def settle(recipe: Recipe) -> Recipe:
    """`recipe` with what its engine and its techniques make of what was asked for.

    Raises:
        TechniqueError: a technique that the engine does not have, that does not support the model,
            or that cannot be settled.
        InputError: something that the engine does not have.
    """
    recipe = ENGINES[recipe.execution.engine].settle(recipe)
    _refuse_unsupported(recipe)
    return techniques.settled(recipe)


def _refuse_unsupported(recipe: Recipe) -> None:
    engine = recipe.execution.engine
    for choice in recipe.techniques:
        technique = techniques.create(choice)
        if engine not in technique.engines:
            known = " and ".join(technique.engines)
            raise TechniqueError(f"{technique.name} is a technique of {known}, not of {engine}.")
        reason = technique.unsupported(recipe.model)
        if reason is not None:
            raise TechniqueError(f"{technique.name} cannot act on {recipe.model.name}: {reason}")


def default_execution(device: Device, engine: Engine = "ullage") -> Execution:
    """What `engine` runs on `device` when nothing is asked."""
    return ENGINES[engine].defaults(device)
