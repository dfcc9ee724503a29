"""transformers' generate: one pass over the prompt, a DynamicCache that appends by copying."""

from dataclasses import replace

from ullage.planner.engines import forward
from ullage.planner.engines.ullage import Ullage
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Term
from ullage.specs.model import LayerCache, ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.workload import Execution, PhaseName, Step


class Transformers(Ullage):
    """`generate`, in ullage's formats and on its devices."""

    kv_dtypes = tuple(DTYPE_BYTES)
    attentions = ("sdpa", "eager", "flash")

    def defaults(self, device: Device) -> Execution:
        """ullage's formats, and the whole prompt at once."""
        return replace(super().defaults(device), engine="transformers", prefill_chunk=0)

    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """All prompts at once. The last token out is never fed back, so its KV entries are never
        made."""
        work = recipe.workload
        chunk_tokens = min(recipe.execution.prefill_chunk or work.prompt_tokens, work.prompt_tokens)
        held = {"load": 0, "prefill": work.prompt_tokens, "decode": work.context_tokens - 1}
        new = {"load": 0, "prefill": chunk_tokens * work.sequences, "decode": work.sequences}
        return Step(phase, work.sequences, held[phase], new[phase], recipe.execution)

    def load_terms(self, recipe: Recipe) -> list[Term]:
        """Nothing: what transformers maps from the checkpoint the kernel drops when it must."""
        return []

    def kv_term(self, model: ModelSpec, step: Step) -> Term:
        """Exact tensors of every layer."""
        numbers = sum(
            count * cache.width * _kept_tokens(cache, step.held_tokens)
            for cache, count in model.cache_kinds
        )
        sequence_bytes = numbers * DTYPE_BYTES[step.execution.kv_dtype]
        source = f"{step.sequences:,} x {step.held_tokens:,} tokens, window - 1 of a sliding layer"
        return forward.kv_term(model, step, "DynamicCache", sequence_bytes, source)

    def attention_term(self, recipe: Recipe, step: Step) -> Term:
        """DynamicCache appends by copying a layer's K, then its V; later chunks need a mask, and
        with a mask K and V are repeated to all query heads."""
        model, number_bytes = recipe.model, DTYPE_BYTES[step.execution.dtype]
        copied = step.sequences * step.held_tokens * model.kv_width // 2 * number_bytes
        if step.phase == "prefill" and step.new_tokens < step.sequences * step.held_tokens:
            mask = step.new_tokens * step.held_tokens * (1 + number_bytes)
            copied = max(copied, mask + forward.repeated_kv_bytes(model, step))
        return Term("activation", "one layer's K copied to append", copied, "exact", "DynamicCache")


def _kept_tokens(cache: LayerCache, held_tokens: int) -> int:
    """DynamicCache keeps window - 1 entries of a sliding layer: the newest is the query's own."""
    return held_tokens if cache.window is None else min(held_tokens, cache.window - 1)
