"""The engines whose memory can be planned: one engine, one file."""

from ullage.planner.engines.base import EngineArithmetic
from ullage.planner.engines.llamacpp import LlamaCpp
from ullage.planner.engines.sglang import Sglang
from ullage.planner.engines.transformers import Transformers
from ullage.planner.engines.ullage import Ullage
from ullage.planner.engines.vllm import Vllm
from ullage.specs.workload import Engine

__all__ = ["ENGINES", "EngineArithmetic"]

ENGINES: dict[Engine, EngineArithmetic] = {
    "ullage": Ullage(),
    "transformers": Transformers(),
    "vllm": Vllm(),
    "sglang": Sglang(),
    "llama.cpp": LlamaCpp(),
}
