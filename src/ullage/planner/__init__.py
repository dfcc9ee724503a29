"""Arithmetic: a model's geometry in, a Plan out. No torch."""

from ullage.planner.build import build_plan, default_execution
from ullage.planner.fitting import Choice, fit_run

__all__ = ["Choice", "build_plan", "default_execution", "fit_run"]
