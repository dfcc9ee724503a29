"""SGLang: ``python -m sglang.launch_server``."""

from ullage.exporters.shared import plans, text
from ullage.exporters.shared.options import Option, known
from ullage.specs.plan import Plan
from ullage.units import format_bytes

_KV_DTYPES = {"bf16": "bfloat16", "fp8": "fp8_e4m3"}
_ONLINE = {"fp8": "fp8"}  # what it makes of a plain checkpoint while loading
_ONLINE_CUDA = {**_ONLINE, "nf4": "bitsandbytes"}


def export(plan: Plan) -> str:
    """The command that serves the plan.

    Raises:
        InputError: something that SGLang does not have.
    """
    plans.refuse_others(plan, "sglang", "cuda", "rocm", "cpu")
    command = ("python", "-m", "sglang.launch_server")
    options = [
        *_weights(plan), *_formats(plan), *_sizes(plan), *_memory(plan), *_devices(plan)
    ]  # fmt: skip
    return text.shell(_notes(plan), _environment(plan), command, options)


def _notes(plan: Plan) -> list[str]:
    lines = plans.notes_of(plan, known("sglang"))
    stored = plan.recipe.model.stored_formats
    model = plan.recipe.model
    if stored and not model.converted and not plans.weights_of(model).gguf:
        lines.append(
            f"{', '.join(stored)} weights: SGLang reads that from the checkpoint's config."
        )
    if plan.recipe.execution.attention == "eager":
        lines.append("SGLang has no eager attention: its kernels build no score matrix.")
    if not _memory(plan):
        lines.append("Planned with the whole device: SGLang takes its own default share of it.")
    return lines


def _environment(plan: Plan) -> list[Option]:
    if plan.recipe.device.kind != "cuda":
        return []
    why = "freed memory of one size serves another"
    return [Option("PYTORCH_ALLOC_CONF", "expandable_segments:True", why)]


def _weights(plan: Plan) -> list[Option]:
    weights = plans.weights_of(plan.recipe.model)
    options = [Option("--model-path", weights.name, "hub id, folder or file")]
    if weights.revision:
        options.append(Option("--revision", weights.revision, "the revision that was planned"))
    return [*options, *_quantization(plan, weights.gguf)]


def _quantization(plan: Plan, gguf: bool) -> list[Option]:
    """What is not in the checkpoint's config: that it is GGUF, or made while loading."""
    online = _ONLINE_CUDA if plan.recipe.device.kind == "cuda" else _ONLINE
    if not gguf:
        plans.refuse_gguf_types(plan, "sglang")
    plans.refuse_converted(plan, known("sglang"), online)
    made = plan.recipe.model.converted or plans.scheme_of(plan)
    if gguf or made not in online:
        plans.refuse_scheme(plan, known("sglang"))
        return _loader("gguf", "weights as the GGUF file has them") if gguf else []
    return _loader(online[made], f"{made}, quantized while loading")


def _loader(name: str, why: str) -> list[Option]:
    options = [Option("--quantization", known("sglang").choice("--quantization", name), why)]
    if name in known("sglang").choices["--load-format"]:
        options.append(Option("--load-format", name, why))
    return options


def _formats(plan: Plan) -> list[Option]:
    execution = plan.recipe.execution
    dtype = known("sglang").choice("--dtype", plans.torch_dtype(execution.dtype))
    kv_dtype = _KV_DTYPES.get(execution.kv_dtype, execution.kv_dtype)
    if execution.kv_dtype == execution.dtype and kv_dtype not in _KV_DTYPES.values():
        kv_dtype = "auto"  # as the arithmetic: there is no other name for it
    return [
        Option("--dtype", dtype, "unquantized weights and the arithmetic"),
        Option(
            "--kv-cache-dtype",
            known("sglang").choice("--kv-cache-dtype", kv_dtype),
            f"{plan.kv_bytes_per_token:,} bytes of KV a token in {execution.kv_dtype}",
        ),
    ]


def _sizes(plan: Plan) -> list[Option]:
    work, execution = plan.recipe.workload, plan.recipe.execution
    chunk = execution.prefill_chunk
    return [
        Option("--context-length", work.context_tokens, "prompt and output together, in tokens"),
        Option(
            "--max-running-requests",
            execution.max_num_seqs or work.sequences,
            "sequences at the same time: more would need more",
        ),
        Option(
            "--chunked-prefill-size",
            chunk or -1,
            "prompt tokens a step" if chunk else "a whole prompt in one step",
        ),
    ]


def _memory(plan: Plan) -> list[Option]:
    """SGLang's own plans have the static share for a budget; of another's it is what is static:
    activations and graphs stand beside it."""
    static_bytes = plan.share.weights_bytes + plan.share.kv_pool_bytes
    if plan.recipe.execution.engine == "sglang":
        static_bytes = plan.budget_bytes
    share = plans.fraction_of(plan, min(static_bytes, plan.budget_bytes))
    if share is None:
        return []
    why = f"weights and KV pool, {format_bytes(static_bytes)}; the rest is for activations"
    return [Option("--mem-fraction-static", share, why)]


def _devices(plan: Plan) -> list[Option]:
    execution, found = plan.recipe.execution, []
    if plan.recipe.device.kind == "cpu":
        found.append(Option("--device", "cpu", "as planned"))
    if execution.tensor_parallel > 1:
        why = "devices that share each layer"
        found.append(Option("--tp-size", execution.tensor_parallel, why))
    if execution.pipeline_parallel > 1:
        why = "devices that share the stack"
        found.append(Option("--pp-size", execution.pipeline_parallel, why))
    if execution.engine == "sglang" and plan.share.graph_bytes:
        why = "CUDA graphs are planned for so many"
        largest = execution.max_num_seqs or plan.recipe.workload.sequences
        found.append(Option("--cuda-graph-max-bs-decode", largest, why))
    if plans.no_graphs(plan, "sglang"):
        why = "no room is planned for CUDA graphs"
        found.append(Option("--disable-prefill-cuda-graph", None, why))
        found.append(Option("--disable-decode-cuda-graph", None, why))
    return found
