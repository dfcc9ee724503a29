"""What attention is planned to hold, against the live bytes of the tensors that it makes."""

import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from ullage import Device, Execution, ModelSpec, Recipe, Workload
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.kernels import Kernel, cpu, reference, threads
from ullage.kv.pool import KVPool
from ullage.planner.memory import explain, phase_footprints
from ullage.runtime.load import TORCH_DTYPES
from ullage.specs.blocks import sequence_blocks
from ullage.specs.families import RUNNING
from ullage.specs.workload import PhaseName
from ullage.units import GIB

TinyModel = Callable[..., tuple[Any, ModelSpec]]
PeakOf = Callable[[Callable[[], Any]], int]

# Narrow MLPs and vocabularies: attention is where these models stand highest.
WIDE = {
    "num_hidden_layers": 2, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32,
    "hidden_size": 64, "intermediate_size": 8, "vocab_size": 64, "max_position_embeddings": 8192,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("qwen3", {}),
    "windowed": ("mistral", {"sliding_window": 700}),
    "softcap": ("gemma2", {"layer_types": ["full_attention"] * 2}),
    "softcap, windowed": (
        "gemma2", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 700},
    ),
}  # fmt: skip
SIZED = {
    "num_hidden_layers": 2, "num_attention_heads": 8, "hidden_size": 256, "intermediate_size": 700,
    "vocab_size": 5000, "max_position_embeddings": 8192,
}  # fmt: skip
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 256}
OWN_SIZES: dict[str, dict[str, Any]] = {
    "gemma2": MIXED,
    "gemma3_text": MIXED,
    "gpt2": {"n_embd": 256, "n_layer": 2, "n_head": 8, "n_inner": 700, "n_positions": 8192},
    "phi": {"num_key_value_heads": 8},
}
FORMATS = [
    ("fp32", "fp32"), ("fp32", "bf16"), ("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "int8"),
    ("bf16", "int8"), ("bf16", "fp8"),
]  # fmt: skip


def recipe_for(spec: ModelSpec, kind: str, dtype: str, kv_dtype: str, chunk: int) -> Recipe:
    execution = Execution(dtype=dtype, kv_dtype=kv_dtype, prefill_chunk=chunk)
    return Recipe(spec, Device("one", kind, 64 * GIB), Workload(2990, 10), execution)  # type: ignore[arg-type]


def measured_bytes(model: Any, recipe: Recipe, peak_of: PeakOf) -> dict[str, int]:
    """The peak of the last chunk of a prompt, and of a token after it."""
    spec, execution, work = recipe.model, recipe.execution, recipe.workload
    attention.register()
    model.to(TORCH_DTYPES[execution.dtype]).set_attn_implementation(attention.NAME)
    blocks = sequence_blocks(spec, work.context_tokens)
    pool = KVPool(blocks, spec.head_dim, TORCH_DTYPES[execution.kv_dtype])
    cache = PagedCache(spec, pool)
    cache.activate([cache.open(work.context_tokens)])
    ids = torch.arange(work.prompt_tokens)[None] % spec.vocab_size

    def read(start: int, stop: int) -> None:
        positions = torch.arange(start, stop)[None]
        model(
            ids[:, start:stop],
            position_ids=positions,
            **cache_argument(model, cache),
            logits_to_keep=1,
        )

    last = work.prompt_tokens - execution.prefill_chunk
    with torch.inference_mode():
        for start in range(0, last, 512):
            read(start, min(start + 512, last))
        prefill = peak_of(lambda: read(last, work.prompt_tokens))
        return {"prefill": prefill, "decode": peak_of(lambda: read(0, 1))}


def beside_tensors_bytes(recipe: Recipe, phase: PhaseName) -> int:
    """What is planned for libraries' own buffers, which are no tensors."""
    beside = ("margin", "laid out anew", "oneDNN")
    terms = explain(recipe, phase)
    return sum(term.nbytes for term in terms if any(word in term.what for word in beside))


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("device", ["cpu", "mps"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_step_holds_what_was_planned(
    kind: str,
    device: str,
    dtype: str,
    kv_dtype: str,
    tiny_model: TinyModel,
    peak_of: PeakOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "mps":  # its kernel runs anywhere
        monkeypatch.setattr(attention, "kernel_for", lambda _: reference.attend)
    family, changes = MODELS[kind]
    model, spec = tiny_model(family, **WIDE | changes)
    recipe = recipe_for(spec, device, dtype, kv_dtype, chunk=300)
    # a few rows of sums are counted as if they lived together
    check(recipe, measured_bytes(model, recipe, peak_of), 0.06)


def check(recipe: Recipe, measured: dict[str, int], within: float) -> None:
    """Nothing holds more than was planned, and not much less."""
    for phase, footprint in phase_footprints(recipe).items():
        if phase in measured:
            planned_bytes = footprint.activation_bytes + footprint.logits_bytes
            planned_bytes -= beside_tensors_bytes(recipe, phase)
            assert measured[phase] <= planned_bytes
            # a token's heads are joined where they lie in several pieces, and these in one
            assert planned_bytes == pytest.approx(measured[phase], rel=within, abs=2100)


@pytest.mark.triton
@pytest.mark.parametrize(
    ("kind", "dtype", "kv_dtype"),
    [
        ("full", "bf16", "fp32"),
        ("windowed", "fp32", "fp32"),
        ("full", "fp32", "int8"),
        ("full", "fp32", "fp8"),
    ],
)
def test_a_step_in_splits_holds_what_was_planned(
    kind: str,
    dtype: str,
    kv_dtype: str,
    tiny_model: TinyModel,
    peak_of: PeakOf,
    triton_kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def attend(query: torch.Tensor, *rest: Any) -> torch.Tensor:
        measured = query.shape[1] in (1, 20)  # it is slow where there is no GPU
        output = (triton_kernel if measured else reference.attend)(query, *rest)
        gc.collect()  # Triton's interpreter leaves tensors behind in cycles
        return output

    monkeypatch.setattr(attention, "kernel_for", lambda _: attend)
    family, changes = MODELS[kind]
    model, spec = tiny_model(family, **WIDE | changes)
    recipe = recipe_for(spec, "cuda", dtype, kv_dtype, chunk=20)
    check(recipe, measured_bytes(model, recipe, peak_of), 0.1)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("family", RUNNING)
def test_a_familys_chunk_holds_what_was_planned(
    family: str, dtype: str, tiny_model: TinyModel, peak_of: PeakOf
) -> None:
    """In the proportions of real models, whose MLP or attention may be the widest."""
    model, spec = tiny_model(family, **SIZED, **OWN_SIZES.get(family, {}))
    recipe = recipe_for(spec, "cpu", dtype, dtype, chunk=300)
    planned = phase_footprints(recipe)["prefill"]
    measured = measured_bytes(model, recipe, peak_of)["prefill"]
    # token numbers and positions are not counted
    planned_bytes = planned.activation_bytes + planned.logits_bytes
    planned_bytes -= beside_tensors_bytes(recipe, "prefill")
    assert 0.9 < measured / planned_bytes < 1.005


def written_together(
    model: Any, spec: ModelSpec, execution: Execution, tokens: int, sequences: int
) -> Callable[[], None]:
    """A token for each of some sequences of `tokens` in all, this one included."""
    attention.register()
    model.to(TORCH_DTYPES[execution.dtype]).set_attn_implementation(attention.NAME)
    blocks = sequences * sequence_blocks(spec, tokens + 1)
    pool = KVPool(blocks, spec.head_dim, TORCH_DTYPES[execution.kv_dtype])
    cache = PagedCache(spec, pool)
    opened = [cache.open(tokens + 1) for _ in range(sequences)]

    def read(count: int) -> None:
        ids = torch.zeros(sequences, count, dtype=torch.long)
        positions = torch.arange(opened[0].length, opened[0].length + count)
        told = {"position_ids": positions.expand(ids.shape), "logits_to_keep": 1}
        with torch.inference_mode():
            model(ids, **told, **cache_argument(model, cache))

    cache.activate(opened)
    read(tokens - 1)
    return lambda: read(1)


def together(spec: ModelSpec, device: str, execution: Execution, sequences: int) -> Recipe:
    work = Workload(1190, 10, sequences)
    return Recipe(spec, Device("one", device, 64 * GIB), work, execution)  # type: ignore[arg-type]


@pytest.mark.parametrize(("dtype", "kv_dtype"), FORMATS)
@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_sequences_that_write_together_hold_what_was_planned(
    device: str,
    dtype: str,
    kv_dtype: str,
    tiny_model: TinyModel,
    peak_of: PeakOf,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "mps":
        monkeypatch.setattr(attention, "kernel_for", lambda _: reference.attend)
    model, spec = tiny_model("qwen3", **WIDE)
    execution = Execution(dtype=dtype, kv_dtype=kv_dtype)
    write = written_together(model, spec, execution, 1200, 40)
    check(together(spec, device, execution, 40), {"decode": peak_of(write)}, 0.12)


@pytest.mark.triton
@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_sequences_in_splits_hold_what_was_planned(
    kv_dtype: str,
    tiny_model: TinyModel,
    peak_of: PeakOf,
    triton_kernel: Kernel,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, spec = tiny_model("qwen3", **WIDE)
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype)
    write = written_together(model, spec, execution, 1200, 5)

    def attend(*given: Any) -> torch.Tensor:
        output = triton_kernel(*given)
        gc.collect()  # Triton's interpreter leaves tensors behind in cycles
        return output

    monkeypatch.setattr(attention, "kernel_for", lambda _: attend)
    planned = phase_footprints(together(spec, "cuda", execution, 5))["decode"]
    planned_bytes = planned.activation_bytes + planned.logits_bytes
    planned_bytes -= beside_tensors_bytes(together(spec, "cuda", execution, 5), "decode")
    assert peak_of(write) <= planned_bytes


@pytest.mark.parametrize("tokens", [100, 400, 1200])
def test_threads_convert_no_more_than_was_planned(
    tokens: int, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if all were at their largest tile at once."""
    model, spec = tiny_model("qwen3", **WIDE)
    execution = Execution(dtype="bf16", kv_dtype="int8")
    write = written_together(model, spec, execution, tokens, 8)
    largest, real = [0], cpu._ATTENTION

    def watched(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, **rest: Any) -> Any:
        largest.append(keys.nbytes + values.nbytes)
        return real(query, keys, values, **rest)

    monkeypatch.setattr(cpu, "_ATTENTION", watched)
    monkeypatch.setattr(cpu, "SHARED_TOKENS", 0)
    monkeypatch.setattr(threads, "count", lambda calls: min(8, calls))
    write()
    recipe = replace(together(spec, "cpu", execution, 8), workload=Workload(tokens - 10, 10, 8))
    planned = {term.what: term.nbytes for term in explain(recipe, "decode")}
    assert 8 * max(largest) <= planned["scratch of attention"]
