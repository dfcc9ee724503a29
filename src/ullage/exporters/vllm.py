"""vLLM: ``vllm serve``. Its options are Ray Serve's and KServe's too."""

from ullage.errors import InputError
from ullage.exporters.shared import plans, text
from ullage.exporters.shared.options import Option, known
from ullage.specs.plan import Plan
from ullage.units import format_bytes

_KV_DTYPES = {
    "bf16": "bfloat16", "fp16": "float16", "fp8": "fp8", "int8": "int8_per_token_head",
}  # fmt: skip
# What it makes of a plain checkpoint while loading; its int8_per_channel_weight_only leaves all but
# experts as they are.
_ONLINE = {"fp8": "fp8_per_channel", "mxfp4": "mxfp4"}


def export(plan: Plan) -> str:
    """The command that serves the plan.

    Raises:
        InputError: something that vLLM does not have.
    """
    command = ("vllm", "serve", plans.weights_of(plan.recipe.model).name)
    return text.shell(notes(plan), environment(plan), command, options(plan))


def notes(plan: Plan) -> list[str]:
    """What no option says."""
    lines = plans.notes_of(plan, known("vllm"))
    stored = plan.recipe.model.stored_formats
    if stored and not plan.recipe.model.converted:
        lines.append(f"{', '.join(stored)} weights: vLLM reads that from the checkpoint's config.")
    if plan.recipe.execution.attention == "eager":
        lines.append("vLLM has no eager attention: its kernels build no score matrix.")
    if plans.fraction_of(plan, plan.budget_bytes) is None:
        lines.append("Planned with the whole device: vLLM takes its own default share of it.")
    return lines


def environment(plan: Plan) -> list[Option]:
    """Environment variables of the server."""
    if plan.recipe.device.kind != "cuda":
        return []
    why = "freed memory of one size serves another; leave it out beside a KV connector"
    return [Option("PYTORCH_ALLOC_CONF", "expandable_segments:True", why)]


def options(plan: Plan) -> list[Option]:
    """Every option that the plan decides.

    Raises:
        InputError: something that vLLM does not have.
    """
    plans.refuse_others(plan, "vllm", "cuda", "rocm", "cpu")
    plans.refuse_scheme(plan, known("vllm"))
    plans.refuse_bitsandbytes(plan, known("vllm"))
    plans.refuse_gguf_types(plan, "vllm")
    plans.refuse_converted(plan, known("vllm"), _ONLINE)
    weights = plans.weights_of(plan.recipe.model)
    if weights.gguf:
        raise InputError(f"vllm {known('vllm').version} reads no GGUF: plan the original model.")
    pinned = [Option("--revision", weights.revision, "the revision that was planned")]
    return [
        *(pinned if weights.revision else []),
        *_quantization(plan),
        *_formats(plan),
        *_sizes(plan),
        *_memory(plan),
        *_devices(plan),
    ]


def _quantization(plan: Plan) -> list[Option]:
    converted = plan.recipe.model.converted
    if not converted:
        return []
    method = known("vllm").choice("--quantization", _ONLINE[converted])
    return [Option("--quantization", method, f"{converted} weights, made while loading")]


def _formats(plan: Plan) -> list[Option]:
    execution = plan.recipe.execution
    dtype = known("vllm").choice("--dtype", plans.torch_dtype(execution.dtype))
    kv_dtype = _KV_DTYPES.get(execution.kv_dtype, execution.kv_dtype)
    if execution.kv_dtype == execution.dtype == "fp32":
        kv_dtype = "auto"  # as the arithmetic: there is no name for fp32
    return [
        Option("--dtype", dtype, "unquantized weights and the arithmetic"),
        Option(
            "--kv-cache-dtype",
            known("vllm").choice("--kv-cache-dtype", kv_dtype),
            f"{plan.kv_bytes_per_token:,} bytes of KV a token in {execution.kv_dtype}",
        ),
    ]


def _sizes(plan: Plan) -> list[Option]:
    work, execution = plan.recipe.workload, plan.recipe.execution
    sequences = execution.max_num_seqs or work.sequences
    chunk_tokens = execution.prefill_chunk or work.prompt_tokens
    why = "prompt tokens a step" if execution.prefill_chunk else "a whole prompt in one step"
    if chunk_tokens < sequences:
        why = f"planned {chunk_tokens:,}; vLLM wants no fewer than --max-num-seqs"
    return [
        Option("--max-model-len", work.context_tokens, "prompt and output together, in tokens"),
        Option("--max-num-seqs", sequences, "sequences in a step: more would need more"),
        Option("--max-num-batched-tokens", max(chunk_tokens, sequences), why),
    ]


def _memory(plan: Plan) -> list[Option]:
    """A share, and never --kv-cache-memory-bytes: that skips the profiling of the peak, and the
    first long prompt finds no room."""
    share = plans.fraction_of(plan, plan.budget_bytes)
    if share is None:
        return []
    why = (
        f"{format_bytes(plan.budget_bytes)} of {format_bytes(plan.recipe.device.memory_bytes)}; "
        "the peak is profiled inside it, the KV pool gets the rest"
    )
    return [Option("--gpu-memory-utilization", share, why)]


def _devices(plan: Plan) -> list[Option]:
    execution, found = plan.recipe.execution, []
    if execution.tensor_parallel > 1:
        why = "devices that share each layer"
        found.append(Option("--tensor-parallel-size", execution.tensor_parallel, why))
    if execution.pipeline_parallel > 1:
        why = "devices that share the stack"
        found.append(Option("--pipeline-parallel-size", execution.pipeline_parallel, why))
    if plans.no_graphs(plan, "vllm"):
        found.append(Option("--enforce-eager", None, "no room is planned for CUDA graphs"))
    return found
