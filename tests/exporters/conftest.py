"""Plans of a tiny model, for any engine: what an exporter reads does not hang on the arithmetic."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from ullage.planner import build_plan
from ullage.specs.device import Device
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan, Recipe, TechniqueChoice
from ullage.specs.workload import Execution, Workload
from ullage.units import GIB

WORK = Workload(3840, 256, 4)
H100 = Device("h100-80gb", "cuda", 80 * GIB)


@pytest.fixture(scope="session")
def make_plan(tiny_spec: Callable[..., ModelSpec]) -> Callable[..., Plan]:
    """`make_plan(**changes)`: a plan of a tiny model; what is no parameter is a setting of its
    execution."""

    def make(
        source: str = "org/tiny",
        scheme: str = "none",
        others: tuple[str, ...] = (),
        device: Device = H100,
        budget_bytes: int = 60 * GIB,
        work: Workload = WORK,
        family: str = "llama",
        **execution: Any,
    ) -> Plan:
        spec = replace(tiny_spec(family), source=source)
        plan = build_plan(Recipe(spec, device, work, Execution()), budget_bytes)
        names = [TechniqueChoice(name, {}) for name in others]
        if scheme != "none":
            names.append(TechniqueChoice("quantization", {"scheme": scheme}))
        settings = replace(Execution(), **execution)
        recipe = replace(plan.recipe, execution=settings, techniques=tuple(names))
        return replace(plan, recipe=recipe)

    return make
