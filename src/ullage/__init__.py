"""ullage: plan, shrink, run and measure the memory of large language models.

The names here need no torch. The runtime is imported by name: ``from ullage.runtime.engine import
Engine``.
"""

from ullage.errors import BudgetExceeded, DoesNotFit, InputError, UllageError
from ullage.planner import build_plan, default_execution, fit_run
from ullage.specs.device import Device, find_device
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan, Recipe, TechniqueChoice
from ullage.specs.sources import resolve
from ullage.specs.workload import Execution, Workload

__version__ = "0.1.0"

__all__ = [
    "BudgetExceeded",
    "Device",
    "DoesNotFit",
    "Execution",
    "Footprint",
    "InputError",
    "ModelSpec",
    "Plan",
    "Recipe",
    "TechniqueChoice",
    "UllageError",
    "Workload",
    "build_plan",
    "default_execution",
    "find_device",
    "fit_run",
    "resolve",
]
