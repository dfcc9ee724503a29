"""llama.cpp: everything is reserved when it starts, for the longest context and the largest
micro-batch: the model's buffer, the KV cache and one compute buffer."""

from dataclasses import replace

from ullage.planner.constants import Constants
from ullage.planner.engines.base import EngineArithmetic
from ullage.specs.device import Device
from ullage.specs.dtypes import KV_BITS
from ullage.specs.footprint import Term
from ullage.specs.gguf_quant import MIXTURES, as_gguf, is_gguf
from ullage.specs.model import LayerCache, ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import Execution, PhaseName, Step

PAD_TOKENS = 256  # a sequence's cells, and a sliding layer's, are multiples of it
_STATE_BYTES = 4  # recurrent and convolution states are fp32, whatever the KV entries are
# Families whose config slides, but whose layers see everything in llama.cpp.
_NEVER_SLIDE = ("mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "phi3", "phimoe")


class LlamaCpp(EngineArithmetic):
    """llama-server and llama-cli: ``--ubatch-size`` is the prefill chunk, ``-np`` the sequences,
    and ``-c`` all sequences' tokens together."""

    kv_dtypes = ("fp32", "fp16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
    weights = tuple(MIXTURES)

    def defaults(self, device: Device) -> Execution:
        """What `llama-server` does: an F16 file, F16 KV entries, micro-batches of 512."""
        return Execution("llama.cpp", dtype="fp16", kv_dtype="fp16", attention="flash")

    def with_weights(self, recipe: Recipe, weights: str) -> Recipe:
        """The model as that GGUF file type; KV entries have a format of their own."""
        return replace(recipe, model=as_gguf(recipe.model, weights))

    def settle(self, recipe: Recipe) -> Recipe:
        """A model that is no GGUF file yet becomes one of F16."""
        recipe = super().settle(recipe)
        if is_gguf(recipe.model) or recipe.model.source.endswith(".gguf"):
            return recipe
        return self.with_weights(recipe, recipe.execution.dtype)

    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """The graph is reserved once, in every phase: the whole context, and a full micro-batch."""
        work = recipe.workload
        cells = work.sequences * _padded(work.context_tokens)
        ubatch_tokens = min(recipe.execution.prefill_chunk or work.prompt_tokens, cells)
        return Step(phase, work.sequences, work.context_tokens, ubatch_tokens, recipe.execution)


def _padded(tokens: int) -> int:
    return -(-tokens // PAD_TOKENS) * PAD_TOKENS
