"""SGLang: ``python -m sglang.launch_server``."""

from ullage.exporters.shared import plans, servers, text
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
        *_weights(plan),
        *servers.formats(plan, known("sglang"), _KV_DTYPES),
        *_sizes(plan),
        *_memory(plan),
        *_devices(plan),
    ]
    notes = servers.notes(plan, known("sglang"), "SGLang")
    return text.shell(notes, servers.environment(plan), command, options)


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
    found += servers.devices(plan, "--tp-size", "--pp-size")
    if execution.engine == "sglang" and plan.share.graph_bytes:
        why = "CUDA graphs are planned for so many"
        largest = execution.max_num_seqs or plan.recipe.workload.sequences
        found.append(Option("--cuda-graph-max-bs-decode", largest, why))
    if plans.no_graphs(plan, "sglang"):
        why = "no room is planned for CUDA graphs"
        found.append(Option("--disable-prefill-cuda-graph", None, why))
        found.append(Option("--disable-decode-cuda-graph", None, why))
    return found
