"""The engines whose memory can be planned: one engine, one file."""

from ullage.planner.engines.base import EngineArithmetic
from ullage.planner.engines.llamacpp import LlamaCpp
from ullage.planner.engines.transformers import Transformers
from ullage.planner.engines.ullage import Ullage
from ullage.specs.workload import Engine

__all__ = ["ENGINES", "EngineArithmetic"]

ENGINES: dict[Engine, EngineArithmetic] = {
    "ullage": Ullage(),
    "transformers": Transformers(),
    "llama.cpp": LlamaCpp(),
}
