"""The engines whose memory can be planned: one engine, one file; its module is its arithmetic."""

from ullage.planner.engines import transformers, ullage
from ullage.planner.engines.base import EngineArithmetic
from ullage.specs.workload import Engine

__all__ = ["ENGINES", "EngineArithmetic"]

ENGINES: dict[Engine, EngineArithmetic] = {"ullage": ullage, "transformers": transformers}
