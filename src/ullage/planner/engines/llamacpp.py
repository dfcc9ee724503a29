"""llama.cpp: all is reserved when it starts, for the longest context and the largest micro-batch:
the model's buffer, the KV cache and one compute buffer.

Sizes are those that llama-fit-params b11434 prints; `U` are the tokens of a micro-batch.
"""

from dataclasses import replace
from pathlib import Path

from ullage.planner.constants import Constants
from ullage.planner.engines.base import EngineArithmetic, Planned
from ullage.specs.device import Device
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.footprint import Label, Term
from ullage.specs.gguf import read_header
from ullage.specs.gguf_mixtures import MIXTURES
from ullage.specs.gguf_quant import as_gguf, as_stored, is_gguf
from ullage.specs.model import LayerCache, ModelSpec
from ullage.specs.plan import DeviceShare, Recipe
from ullage.specs.workload import Execution, PhaseName, Step

PAD_TOKENS = 256  # the cells of a sequence, and those of a sliding layer, are multiples of it
# The families whose sliding layers llama.cpp gives a cache of their own; in all others every layer
# keeps every token, whatever the config says.
SLIDING = (
    "gemma2", "gemma3_text", "gemma4_text", "gpt_oss", "cohere2", "llama4_text", "olmo3",
)  # fmt: skip

STATE_BYTES = 4  # of a recurrent state's number, whatever the KV entries are


class LlamaCpp(EngineArithmetic):
    """llama-server and llama-cli: ``-ub`` is the prefill chunk, ``-np`` the sequences, and ``-c``
    the tokens of all sequences together."""

    converts = True
    kv_dtypes = ("fp32", "fp16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
    weights = tuple(MIXTURES)
    attentions = ("flash", "eager")

    def defaults(self, device: Device) -> Execution:
        """An F16 file, F16 KV entries, flash attention, micro-batches of 512."""
        return Execution("llama.cpp", dtype="fp16", kv_dtype="fp16", attention="flash")

    def with_weights(self, recipe: Recipe, weights: str) -> Recipe:
        """The model as a file of that GGUF type; KV entries keep a format of their own."""
        return replace(recipe, model=as_gguf(recipe.model, weights))

    def settle(self, recipe: Recipe) -> Recipe:
        """A GGUF file is what it is; any other model becomes one, F16 unless it was asked for.

        Raises:
            CheckpointError: the file cannot be read any more.
        """
        recipe = super().settle(recipe)
        if is_gguf(recipe.model):
            return recipe
        source = Path(recipe.model.source)
        if source.suffix == ".gguf" and source.is_file():
            return replace(recipe, model=as_stored(recipe.model, read_header(source)))
        return self.with_weights(recipe, recipe.execution.dtype)

    def step(self, recipe: Recipe, phase: PhaseName) -> Step:
        """The same in every phase: the largest graph is reserved once."""
        work = recipe.workload
        ubatch_tokens = recipe.execution.prefill_chunk or work.prompt_tokens
        most_tokens = work.sequences * padded(work.context_tokens)
        new_tokens = min(ubatch_tokens, most_tokens)
        return Step(phase, work.sequences, work.context_tokens, new_tokens, recipe.execution)

    def terms(self, recipe: Recipe, step: Step, constants: Constants) -> list[Term]:
        """What starting reserves; once tokens come, also the scratch that no dry run shows."""
        model, on_cpu = recipe.model, recipe.device.kind == "cpu"
        runtime = constants["runtime_bytes"]
        reserved = [
            _weights_term(model, on_cpu),
            Term("overhead", "runtime", int(runtime.value), runtime.label, runtime.source),
            _kv_term(model, step),
            _state_term(model, step),
            *_compute_terms(model, step, "derived" if on_cpu else "assumed"),
        ]
        if step.phase == "load":
            return reserved
        scratch = [_matmul_term(model, step)]
        if not on_cpu and step.execution.attention != "eager":
            scratch.append(_dequantized_kv_term(model, step))
        return reserved + scratch

    def share(self, planned: Planned) -> DeviceShare:
        """The pool is what is planned, not what is left: llama.cpp takes no more than ``-c``."""
        work = planned.recipe.workload
        return replace(
            super().share(planned),
            kv_pool_bytes=planned.phases["decode"].kv_bytes,
            kv_pool_tokens=work.sequences * padded(work.context_tokens),
            max_concurrency=float(work.sequences),
        )


def padded(tokens: int) -> int:
    """Cells of a sequence of `tokens`."""
    return -(-tokens // PAD_TOKENS) * PAD_TOKENS


def _weights_term(model: ModelSpec, on_cpu: bool) -> Term:
    """Every tensor; of an accelerator's memory without the embeddings, which stay in the host's.
    There a tied one is held once more, as the output head."""
    nbytes, source = model.weights_bytes("fp32"), "every tensor in its GGUF type"
    if not on_cpu:
        embeddings = [tensor for tensor in model.tensors if tensor.role == "embedding"]
        nbytes -= sum(tensor.stored_bytes("fp32") for tensor in embeddings)
        if model.tie_embeddings:
            nbytes += embeddings[0].stored_bytes("fp32")
        source += ", embeddings in host memory"
    return Term("weights", "model buffer", nbytes, "exact", source)


def _kv_term(model: ModelSpec, step: Step) -> Term:
    numbers = sum(
        count * cache.width * _cells(model, cache, step) for cache, count in model.cache_kinds
    )
    dtype = step.execution.kv_dtype
    nbytes = int(step.sequences * numbers * KV_BITS[dtype] / 8)
    source = f"{step.sequences:,} x {padded(step.held_tokens):,} cells, window and micro-batch"
    source += " of a sliding layer" if any(model.windows) else ""
    return Term("kv", f"KV cache in {dtype}", nbytes, "exact", source)


def _cells(model: ModelSpec, cache: LayerCache, step: Step) -> int:
    """Tokens that one layer has room for: all, or a window and a micro-batch."""
    whole_tokens = padded(step.held_tokens)
    if cache.window is None or model.family not in SLIDING:
        return whole_tokens
    return padded(min(whole_tokens, cache.window + step.new_tokens))


def _state_term(model: ModelSpec, step: Step) -> Term:
    """Recurrent states, in fp32 whatever the KV entries are, and all columns of a convolution but
    the newest, in fp32 too."""
    convolutions = [tensor for tensor in model.tensors if "conv1d.weight" in tensor.name]
    counted, held = 0, 0
    for tensor in convolutions:
        kernel, columns = tensor.shape[-1], tensor.shape[0] * tensor.count
        counted += columns * kernel * DTYPE_BYTES[model.dtype]
        held += columns * (kernel - 1) * STATE_BYTES
    nbytes = step.sequences * max(0, model.state_bytes - counted + held)
    return Term("kv", "recurrent state in fp32", nbytes, "exact", f"{step.sequences:,} sequences")


def _compute_terms(model: ModelSpec, step: Step, label: Label) -> list[Term]:
    """One buffer, as high as the highest moment of the graph: attention, MLP or output head."""
    tokens, mask_bytes = step.new_tokens, _mask_bytes(model, step)
    moments = _moments(model, step)
    highest = max(moments, key=lambda moment: moments[moment])
    nbytes, source = 4 * tokens * moments[highest], f"U x {moments[highest]:,} fp32 numbers"
    mask = Term("activation", "attention masks", mask_bytes, label, "cells x U")
    values = Term("activation", "values turned round", _turned_bytes(model, step), label, "latents")
    if highest != "output head":
        return [
            mask,
            values,
            Term("activation", f"compute buffer, {highest}", nbytes, label, source),
        ]
    logits = Term("logits", "logits of a micro-batch", 4 * tokens * model.vocab_size, label, source)
    rest_bytes = nbytes - logits.nbytes
    return [mask, values, Term("activation", "compute buffer", rest_bytes, label, source), logits]


def _moments(model: ModelSpec, step: Step) -> dict[str, int]:
    """Numbers a token at each moment that can be the highest, what lies in between included. That
    is ggml-alloc's doing; the counts were read off dry runs of 20 geometries."""
    hidden, eager = model.hidden_size, step.execution.attention == "eager"
    keys = model.num_kv_heads * model.head_dim if eager and _latent(model) is None else 0
    experts = max((tensor.active or 0 for tensor in model.tensors), default=0)
    return {
        "attention": _attention_numbers(model, padded(step.held_tokens) if eager else 0),
        "MLP": 5 * hidden + 3 * model.intermediate_size + 2 * keys,
        "experts": 6 * hidden + 2 * experts * hidden + 2 * keys,
        "output head": 6 * hidden + model.vocab_size,
    }


def _mask_bytes(model: ModelSpec, step: Step) -> int:
    """A row a token of the micro-batch for each size of cache: fp16 with flash attention."""
    sizes = {_cells(model, cache, step) for cache, _ in model.cache_kinds if cache.width}
    return sum(sizes) * step.new_tokens * (4 if step.execution.attention == "eager" else 2)


def _attention_numbers(model: ModelSpec, scored_tokens: int) -> int:
    """A token's queries, keys and values, and, without flash attention, its row of scores."""
    hidden, queries = model.hidden_size, model.num_heads * model.head_dim
    scores, latent = model.num_heads * scored_tokens, _latent(model)
    if latent is not None:  # queries are taken into the latent's space
        return 5 * hidden + queries + 2 * model.num_heads * latent + scores
    return 3 * hidden + 3 * queries + 2 * model.num_kv_heads * model.head_dim + scores


def _latent(model: ModelSpec) -> int | None:
    """Width of MLA's latent with its rotary part."""
    name = "kv_a_proj_with_mqa.weight"
    return next((t.shape[0] for t in model.tensors if t.name.endswith(name)), None)


def _turned_bytes(model: ModelSpec, step: Step) -> int:
    """Without flash attention one layer's latents are copied, transposed, to serve as values."""
    latent = _latent(model)
    if latent is None or step.execution.attention != "eager":
        return 0
    return step.sequences * padded(step.held_tokens) * latent * 2


def _matmul_term(model: ModelSpec, step: Step) -> Term:
    """A matrix product narrows its input; the work buffer is made when the first one runs."""
    nbytes = step.new_tokens * max(model.hidden_size, model.intermediate_size) * 2
    return Term(
        "activation", "input of a matrix product", nbytes, "derived", "16 bits, not at boot"
    )


def _dequantized_kv_term(model: ModelSpec, step: Step) -> Term:
    """Flash attention's kernels on CUDA read fp16: any other KV format is copied, layer by layer,
    as far as it is filled."""
    plain = step.execution.kv_dtype == "fp16"
    nbytes = 0 if plain else 2 * step.sequences * padded(step.held_tokens) * model.kv_width
    source = "fp16 copy of one layer's filled cells, ggml-cuda/fattn-common.cuh"
    return Term("activation", "scratch of flash attention", nbytes, "derived", source)
