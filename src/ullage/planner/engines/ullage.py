"""ullage's own engine: a paged pool sized once, prompts read one at a time in chunks."""

from dataclasses import replace
from typing import ClassVar

from ullage.errors import InputError
from ullage.planner.constants import Constants
from ullage.planner.engines import attention, forward
from ullage.planner.engines.base import EngineArithmetic
from ullage.specs.blocks import BLOCK_TOKENS, entry_bytes
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Term
from ullage.specs.model import LayerCache, ModelSpec
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.workload import Attention, Execution, PhaseName, Step


class Ullage(EngineArithmetic):
    """`ullage run`."""

    kv_dtypes = (*DTYPE_BYTES, "int8", "fp8")
    weights = ("fp32", "bf16", "fp16", "int8", "nf4")
    # it runs the first alone, by kernels of its own
    attentions: ClassVar[tuple[Attention, ...]] = ("sdpa", "eager")

    def defaults(self, device: Device) -> Execution:
        """bf16 on accelerators; fp32 on CPUs, most of which multiply bf16 matrices several times
        slower."""
        dtype = "fp32" if device.kind == "cpu" else "bf16"
        return Execution(dtype=dtype, kv_dtype=dtype)

    def with_weights(self, recipe: Recipe, weights: str) -> Recipe:
        """A plain format is the arithmetic's and the KV entries' too; a quantized one is a
        technique."""
        if weights in DTYPE_BYTES:
            execution = replace(recipe.execution, dtype=weights, kv_dtype=weights)
            return replace(recipe, execution=execution)
        choice = TechniqueChoice("quantization", {"scheme": weights})
        return replace(recipe, techniques=(choice, *recipe.techniques))

    def token_bytes(self, model: ModelSpec, width: int, kv_dtype: str) -> int:
        return entry_bytes(model, width, kv_dtype)

    def settle(self, recipe: Recipe) -> Recipe:
        """The model with the KV heads that its modules hand to the cache.

        Raises:
            InputError: something that the engine does not have.
        """
        recipe = super().settle(recipe)
        if recipe.execution.kv_dtype == "fp8" and recipe.device.kind != "cuda":
            raise InputError(
                f"ullage has fp8 KV entries on CUDA alone, not on {recipe.device.name}: int8 takes "
                "the same bytes and is more exact."
            )
        return replace(recipe, model=_as_cached(recipe.model))

    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """Room for prompt and output is reserved at the door; prompts are read one at a time."""
        work = recipe.workload
        chunk_tokens = min(recipe.execution.prefill_chunk or work.prompt_tokens, work.prompt_tokens)
        held = {"load": 0, "prefill": work.context_tokens, "decode": work.context_tokens}
        new = {"load": 0, "prefill": chunk_tokens, "decode": work.sequences}
        return Step(phase, work.sequences, held[phase], new[phase], recipe.execution)

    def terms(self, recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
        """Weights, KV entries, the activations of one pass, one row of logits a sequence."""
        model, dtype = recipe.model, step.execution.dtype
        runtime, weights_bytes = constants["runtime_bytes"], model.weights_bytes(dtype)
        always = [
            Term("weights", f"weights in {dtype}", weights_bytes, "exact", "every tensor"),
            Term("overhead", "runtime", int(runtime.value), runtime.label, runtime.source),
            *_margin_terms(constants),
        ]
        if step.phase == "load":
            return [*always, *self.load_terms(recipe)]
        eager = step.execution.attention == "eager"
        return [
            *always,
            self.kv_term(model, step),
            forward.layer_term(model, step),
            forward.eager_term(model, step) if eager else self.attention_term(recipe, step),
            forward.logits_term(model, step),
            *forward.repacked_terms(recipe, step, constants),
        ]

    def load_terms(self, recipe: Recipe) -> list[Term]:
        """What reading the weights takes beside them."""
        return [forward.conversion_term(recipe.model, recipe.execution.dtype)]

    def kv_term(self, model: ModelSpec, step: Step) -> Term:
        """Whole blocks of every KV head; a sliding layer keeps its window and no more."""
        sequence_bytes = sum(
            count
            * entry_bytes(model, cache.width, step.execution.kv_dtype)
            * BLOCK_TOKENS
            * _blocks(cache.kept_tokens(step.held_tokens))
            for cache, count in model.cache_kinds
        )
        source = f"{step.sequences:,} x {step.held_tokens:,} tokens in blocks of {BLOCK_TOKENS}"
        return forward.kv_term(model, step, "KV blocks", sequence_bytes, source)

    def attention_term(self, recipe: Recipe, step: Step) -> Term:
        """Scratch of attention where no score matrix is built."""
        return attention.scratch_term(recipe, step)


def _as_cached(model: ModelSpec) -> ModelSpec:
    """Falcon's grouped heads are repeated to all query heads before they are cached:
    `FalconAttention._split_heads` of transformers 5.23. Its older models have one KV head, or one
    for each query head, and repeat none."""
    grouped = 1 < model.num_kv_heads < model.num_heads
    if model.family != "falcon" or not grouped:
        return model
    cache = LayerCache(2 * model.num_heads * model.head_dim, heads=model.num_heads)
    return replace(model, num_kv_heads=model.num_heads, caches=(cache,) * model.num_layers)


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


def _margin_terms(constants: Constants) -> list[Term]:
    """What the allocator may hold beyond what lives, where it does."""
    margin = constants["margin_bytes"]
    what = "margin for the allocator"
    term = Term("activation", what, int(margin.value), margin.label, margin.source)
    return [term] if term.nbytes else []
