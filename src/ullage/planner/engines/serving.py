"""What vLLM and SGLang share: formats, steps, and weights that are split over devices."""

from dataclasses import replace

from ullage.errors import InputError
from ullage.planner.engines.base import EngineArithmetic
from ullage.planner.engines.shards import Stage, check_split, tower_bytes, weights_bytes
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Term
from ullage.specs.plan import Recipe
from ullage.specs.quantized import CHECKPOINT_FORMATS, as_checkpoint
from ullage.specs.workload import PhaseName, Step


class Serving(EngineArithmetic):
    """A server that loads a checkpoint as it is and reads prompts in chunks, many at a time."""

    weights = (*DTYPE_BYTES, *CHECKPOINT_FORMATS)
    attentions = ("flash",)
    kinds = ("cuda", "rocm")

    def with_weights(self, recipe: Recipe, weights: str) -> Recipe:
        """A plain format is the arithmetic's and the KV entries' too; of the others the checkpoint
        is taken to have them."""
        if weights in DTYPE_BYTES:
            execution = replace(recipe.execution, dtype=weights, kv_dtype=weights)
            return replace(recipe, execution=execution)
        return replace(recipe, model=as_checkpoint(recipe.model, weights))

    def settle(self, recipe: Recipe) -> Recipe:
        """`recipe`, if it can be split as asked over devices whose terms are known: GPUs'.

        Raises:
            InputError: it cannot.
        """
        execution, device = recipe.execution, recipe.device
        if device.kind not in self.kinds:
            raise InputError(
                f"What {execution.engine} holds is known of NVIDIA and AMD GPUs alone, not of "
                f"{device.name}: name one with --device, or plan --engine llama.cpp, transformers "
                "or ullage."
            )
        check_split(recipe.model, execution)
        return recipe

    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """A chunk holds tokens of all sequences together."""
        work, execution = recipe.workload, recipe.execution
        tokens = work.prompt_tokens * work.sequences
        held = {"load": 0, "prefill": work.context_tokens, "decode": work.context_tokens}
        new = {"load": 0, "prefill": min(execution.prefill_chunk, tokens), "decode": work.sequences}
        return Step(phase, work.sequences, held[phase], new[phase], execution)


def weights_terms(recipe: Recipe, stage: Stage) -> list[Term]:
    """Weights of one device, with the rotary tables and the vision tower.

    Raises:
        UnknownArchitecture: a tower that has no arithmetic here.
    """
    model, dtype = recipe.model, recipe.execution.dtype
    split = recipe.execution.tensor_parallel
    where = f"layers {stage.layers.start} to {stage.layers.stop - 1}"
    terms = [Term("weights", "weights", weights_bytes(model, dtype, split, stage), "exact", where)]
    if model.rope_tables:
        nbytes = model.rope_bytes(dtype)
        terms.append(Term("weights", "cosines and sines", nbytes, "exact", "every position"))
    if stage.first and model.encoder_bytes(dtype):
        nbytes = tower_bytes(model.encoder, dtype, split)
        terms.append(Term("weights", "vision tower", nbytes, "exact", "every tensor"))
    return terms
