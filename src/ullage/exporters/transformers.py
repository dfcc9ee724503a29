"""transformers: a short program with ``from_pretrained`` and ``generate``."""

from collections.abc import Iterator
from pathlib import PurePath

from ullage.errors import InputError
from ullage.exporters.shared import plans, text
from ullage.exporters.shared.options import Option, known
from ullage.specs.plan import Plan
from ullage.units import format_bytes

_ATTENTION = {"eager": "eager", "sdpa": "sdpa", "flash": "flash_attention_2"}
_WALLED = ("cuda", "rocm")  # where torch can be told how much it may take


def export(plan: Plan) -> str:
    """The program that generates as planned; values are Python expressions.

    Raises:
        InputError: something that transformers does not have.
    """
    plans.refuse_others(plan, "transformers", "cuda", "rocm", "mps", "cpu")
    execution = plan.recipe.execution
    if execution.tensor_parallel * execution.pipeline_parallel > 1:
        raise InputError("transformers runs on one device here: plan without --tp and --pp.")
    sections = [
        text.comments(_notes(plan)),
        [*_imports(plan), ""],
        *_memory(plan),
        [*_tokenizer(plan), *_call("model", "AutoModelForCausalLM.from_pretrained", _load(plan))],
        ["", 'inputs = tokenizer("Hello", return_tensors="pt").to(model.device)'],
        _call("output", "model.generate", [Option("**inputs", None, ""), *_generate(plan)]),
        ["print(tokenizer.decode(output[0], skip_special_tokens=True))"],
    ]
    return "\n".join(line for section in sections for line in section) + "\n"


def _notes(plan: Plan) -> list[str]:
    lines = plans.notes_of(plan, known("transformers"))
    if plan.recipe.device.kind not in _WALLED:
        lines.append("Nothing holds the budget here, as `ullage run` would.")
    return lines


def _imports(plan: Plan) -> Iterator[str]:
    if plan.recipe.device.kind == "cuda":
        yield "import os"
        yield ""
        yield "# before torch: freed memory of one size serves another"
        yield 'os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")'
    scheme = plans.scheme_of(plan)
    yield ""
    yield "import torch"
    if scheme == "int8":
        yield "from torchao.quantization import Int8WeightOnlyConfig"
    config = {"nf4": ", BitsAndBytesConfig", "int8": ", TorchAoConfig"}.get(scheme, "")
    yield f"from transformers import AutoModelForCausalLM, AutoTokenizer{config}"


def _memory(plan: Plan) -> Iterator[list[str]]:
    share = plans.fraction_of(plan, plan.budget_bytes)
    if share is not None and plan.recipe.device.kind in _WALLED:
        yield [
            f"# a wall: what would pass {format_bytes(plan.budget_bytes)} fails instead",
            f"torch.cuda.set_per_process_memory_fraction({share})",
            "",
        ]


def _tokenizer(plan: Plan) -> list[str]:
    options = [Option(option.name, option.value, "") for option in _source(plan)]
    return _call("tokenizer", "AutoTokenizer.from_pretrained", options)


def _source(plan: Plan) -> Iterator[Option]:
    """The folder or hub id; of a GGUF file its folder, and its name."""
    weights = plans.weights_of(plan.recipe.model)
    if weights.gguf:
        path = PurePath(weights.name)
        yield Option(text.python(str(path.parent)), None, "the folder")
        yield Option("gguf_file", text.python(path.name), "dequantized while loading")
        return
    yield Option(text.python(weights.name), None, "hub id or folder")
    if weights.revision:
        yield Option("revision", text.python(weights.revision), "the revision that was planned")


def _load(plan: Plan) -> Iterator[Option]:
    execution, device = plan.recipe.execution, plan.recipe.device.kind
    dtype = f"torch.{plans.torch_dtype(execution.dtype)}"
    attention = known("transformers").choice("attn_implementation", _ATTENTION[execution.attention])
    yield from _source(plan)
    yield Option("dtype", dtype, "unquantized weights, the arithmetic and KV entries")
    yield from _quantization(plan, dtype)
    yield Option("attn_implementation", text.python(attention), "as planned")
    place = "cuda" if device == "rocm" else device
    yield Option("device_map", text.python(place), f"all of it on {plan.recipe.device.name}")


def _quantization(plan: Plan, dtype: str) -> Iterator[Option]:
    scheme = plans.scheme_of(plan)
    if scheme == "nf4":
        why = "projections in nf4, scales too in 8 bits; embeddings and head stay"
        config = (
            'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", '
            f"bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype={dtype})"
        )
        yield Option("quantization_config", config, why)
    elif scheme == "int8":
        why = "projections in int8, a scale a row; embeddings and head stay"
        config = "TorchAoConfig(quant_type=Int8WeightOnlyConfig())"
        yield Option("quantization_config", config, why)
    else:
        plans.refuse_converted(plan, known("transformers"))
        if not plans.weights_of(plan.recipe.model).gguf:
            plans.refuse_gguf_types(plan, "transformers")


def _generate(plan: Plan) -> Iterator[Option]:
    work, execution = plan.recipe.workload, plan.recipe.execution
    why = f"after at most {work.prompt_tokens:,} prompt tokens, {work.sequences:,} at a time"
    yield Option("max_new_tokens", work.output_tokens, why)
    if execution.prefill_chunk:
        yield Option("prefill_chunk_size", execution.prefill_chunk, "prompt tokens a pass")
    if execution.kv_dtype == execution.dtype:
        return
    model = plan.recipe.model
    plain = not any(model.windows) and not model.state_bytes
    if execution.kv_dtype != "fp8" or not plain:
        raise InputError(
            f"transformers has no {execution.kv_dtype} KV entries for this model: plan with "
            f"--kv-cache-dtype {execution.dtype}."
        )
    known("transformers").choice("cache_config.backend", "fp8")
    yield Option("cache_implementation", '"quantized"', "KV entries in fp8")
    yield Option("cache_config", '{"backend": "fp8"}', "one scale a tensor")


def _call(result: str, function: str, options: "Iterator[Option] | list[Option]") -> list[str]:
    lines = [f"{result} = {function}("]
    for option in options:
        if option.why:
            lines += text.comments([option.why], indent=4)
        lines.append(f"    {option.name if option.value is None else _keyword(option)},")
    return [*lines, ")"]


def _keyword(option: Option) -> str:
    return f"{option.name}={option.value}"
