"""Plans as other engines' commands: every value follows from the plan, and what an engine lacks is
said."""

import ast
import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ullage import exporters
from ullage.errors import InputError
from ullage.exporters.shared.options import known
from ullage.planner.engines import ENGINES
from ullage.specs.device import Device, DeviceKind
from ullage.specs.dtypes import DTYPE_BYTES, KV_BITS
from ullage.specs.gguf_quant import as_gguf
from ullage.specs.model import ModelSpec, Storage
from ullage.specs.plan import Plan
from ullage.specs.quantized import as_checkpoint
from ullage.specs.workload import Attention, Engine, Workload
from ullage.units import GIB

MakePlan = Callable[..., Plan]
VLLM_BASED = ["vllm", "ray", "kserve"]
CPU = Device("cpu-64gb", "cpu", 64 * GIB)
M3 = Device("m3-max-128gb", "mps", 128 * GIB)
MI300X = Device("mi300x", "rocm", 192 * GIB)
H100 = Device("h100-80gb", "cuda", 80 * GIB)


def argv(command: str) -> dict[str, str]:
    """The options of a shell command, and under "" what stands before them."""
    words = shlex.split(command.replace(" \\\n", " "), comments=True)
    first = next(n for n, word in enumerate(words) if word.startswith("--"))
    found, name = {"": " ".join(words[:first])}, ""
    for word in words[first:]:
        if word.startswith("--"):
            name = word
            found[name] = ""
        else:
            found[name] = word
    return found


def options(text: str, target: str) -> dict[str, Any]:
    """vLLM's options in what was exported to vLLM, Ray or KServe, by Ray's names."""
    if target == "ray":
        kwargs: dict[str, Any] = config_of(text)["engine_kwargs"]
        return {key: "" if value is True else str(value) for key, value in kwargs.items()}
    if target == "kserve":
        spec = yaml.safe_load(text)["spec"]
        environment = spec["template"]["containers"][0]["env"]
        values = {variable["name"]: variable["value"] for variable in environment}
        found = argv("vllm " + values["VLLM_ADDITIONAL_ARGS"])
        if "parallelism" in spec:
            found["--tensor-parallel-size"] = str(spec["parallelism"]["tensor"])
    else:
        found = argv(text)
    return {key[2:].replace("-", "_"): value for key, value in found.items() if key}


def config_of(text: str) -> dict[str, Any]:
    config: dict[str, Any] = yaml.safe_load(text)["applications"][0]["args"]["llm_configs"][0]
    return config


def test_the_folder_is_the_registry() -> None:
    assert exporters.names() == ["kserve", "llama.cpp", "ray", "sglang", "transformers", "vllm"]


def test_an_unknown_target_is_refused(make_plan: MakePlan) -> None:
    with pytest.raises(InputError, match=r"No exporter is called 'tgi'\. There is: kserve, llama"):
        exporters.export(make_plan(), "tgi")


@pytest.mark.parametrize("target", VLLM_BASED)
def test_vllm_gets_what_was_planned(make_plan: MakePlan, target: str) -> None:
    plan = make_plan(
        kv_dtype="fp8", prefill_chunk=2048, max_num_seqs=16, tensor_parallel=2, pipeline_parallel=3
    )
    assert options(exporters.export(plan, target), target) == {
        "dtype": "bfloat16",
        "kv_cache_dtype": "fp8",
        "max_model_len": "4096",
        "max_num_seqs": "16",
        "max_num_batched_tokens": "2048",
        "gpu_memory_utilization": "0.75",
        "tensor_parallel_size": "2",
        "pipeline_parallel_size": "3",
    }


def test_the_vllm_command_names_the_model(make_plan: MakePlan) -> None:
    found = argv(exporters.export(make_plan("org/tiny@v2"), "vllm"))
    assert found[""] == "PYTORCH_ALLOC_CONF=expandable_segments:True vllm serve org/tiny"
    assert found["--revision"] == "v2"


@pytest.mark.parametrize(("chunk", "expected"), [(0, "3840"), (2, "4"), (512, "512")])
def test_vllm_batches_no_fewer_tokens_than_sequences(
    make_plan: MakePlan, chunk: int, expected: str
) -> None:
    found = argv(exporters.export(make_plan(prefill_chunk=chunk), "vllm"))
    assert found["--max-num-batched-tokens"] == expected


@given(memory_bytes=st.integers(GIB, 300 * GIB), share=st.floats(0.01, 1), target=st.just("vllm"))
def test_the_share_is_never_more_than_the_budget(
    make_plan: MakePlan, memory_bytes: int, share: float, target: str
) -> None:
    budget_bytes = int(memory_bytes * share)
    device = Device("some", "cuda", memory_bytes)
    text = exporters.export(make_plan(device=device, budget_bytes=budget_bytes), target)
    written = argv(text).get("--gpu-memory-utilization")
    if budget_bytes == memory_bytes:
        assert written is None
        assert "Planned with the whole device" in text
    else:
        assert written is not None
        assert int(float(written) * memory_bytes) <= budget_bytes + 1  # a float's last digit
        assert float(written) > budget_bytes / memory_bytes - 0.0002


def test_a_default_share_comes_out_as_it_went_in(make_plan: MakePlan) -> None:
    device = Device("h100", "cuda", 85_029_027_840)
    plan = make_plan(device=device, budget_bytes=int(0.92 * device.memory_bytes))
    assert argv(exporters.export(plan, "vllm"))["--gpu-memory-utilization"] == "0.92"


def test_eager_mode_only_where_this_engine_planned_no_graphs(make_plan: MakePlan) -> None:
    assert "--enforce-eager" not in exporters.export(make_plan(), "vllm")
    own = make_plan(engine="vllm")
    assert "--enforce-eager" in argv(exporters.export(own, "vllm"))
    graphs = replace(own, share=replace(own.share, graph_bytes=GIB))
    assert "--enforce-eager" not in argv(exporters.export(graphs, "vllm"))
    assert "--disable-decode-cuda-graph" in exporters.export(make_plan(engine="sglang"), "sglang")


def test_sglang_gets_what_was_planned(make_plan: MakePlan) -> None:
    plan = make_plan("org/tiny@v2", kv_dtype="fp8", prefill_chunk=0, tensor_parallel=2)
    static = (plan.share.weights_bytes + plan.share.kv_pool_bytes) / plan.recipe.device.memory_bytes
    found = argv(exporters.export(plan, "sglang"))
    assert float(found.pop("--mem-fraction-static")) == pytest.approx(static, abs=1e-4)
    assert found == {
        "": "PYTORCH_ALLOC_CONF=expandable_segments:True python -m sglang.launch_server",
        "--model-path": "org/tiny",
        "--revision": "v2",
        "--dtype": "bfloat16",
        "--kv-cache-dtype": "fp8_e4m3",
        "--context-length": "4096",
        "--max-running-requests": "4",
        "--chunked-prefill-size": "-1",
        "--tp-size": "2",
    }


def test_sglangs_own_plan_has_the_static_share_for_a_budget(make_plan: MakePlan) -> None:
    plan = make_plan(engine="sglang", max_num_seqs=24)
    plan = replace(plan, share=replace(plan.share, graph_bytes=GIB))
    found = argv(exporters.export(plan, "sglang"))
    assert found["--mem-fraction-static"] == "0.75"
    assert found["--max-running-requests"] == found["--cuda-graph-max-bs-decode"] == "24"


def test_sglang_quantizes_to_nf4_while_loading(make_plan: MakePlan) -> None:
    found = argv(exporters.export(make_plan(scheme="nf4"), "sglang"))
    assert found["--quantization"] == found["--load-format"] == "bitsandbytes"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"device": CPU}, {"--gpu-layers": "0", "--cache-ram": "0"}),
        ({"tensor_parallel": 2}, {"--split-mode": "tensor", "--tensor-split": "1,1"}),
        ({"pipeline_parallel": 3}, {"--split-mode": "layer", "--tensor-split": "1,1,1"}),
        ({"attention": "eager"}, {"--flash-attn": "off"}),
    ],
)
def test_llama_cpp_is_told_the_devices(
    make_plan: MakePlan, changes: dict[str, Any], expected: dict[str, str]
) -> None:
    found = argv(exporters.export(make_plan("/m/tiny.gguf", **changes), "llama.cpp"))
    assert expected.items() <= found.items()


def test_llama_cpp_gets_what_was_planned(make_plan: MakePlan) -> None:
    found = argv(exporters.export(make_plan("/m/tiny.gguf", kv_dtype="q8_0"), "llama.cpp"))
    assert found == {
        "": "llama-server",
        "--model": "/m/tiny.gguf",
        "--ctx-size": "16384",  # four slots of 4,096
        "--parallel": "4",
        "--ubatch-size": "512",
        "--batch-size": "2048",
        "--cache-type-k": "q8_0",
        "--cache-type-v": "q8_0",
        "--flash-attn": "on",
        "--fit": "off",
        "--gpu-layers": "all",
    }


@pytest.mark.parametrize(("kind", "outtype"), [("F16", "f16"), ("mxfp4", "bf16")])
def test_what_the_converter_writes_is_only_converted(
    make_plan: MakePlan, kind: str, outtype: str
) -> None:
    text = exporters.export(stored(make_plan(), Storage(kind, 16)), "llama.cpp")
    assert f"--outtype {outtype} --outfile tiny-llama-{kind.lower()}.gguf" in text
    assert "llama-quantize" not in text


def test_llama_cpp_says_how_to_make_the_file(make_plan: MakePlan) -> None:
    text = exporters.export(mixed(make_plan(), "q4_k_m"), "llama.cpp")
    assert "# It reads GGUF: convert_hf_to_gguf.py org/tiny --outtype bf16" in text
    assert "# then llama-quantize tiny-llama-bf16.gguf tiny-llama-q4_k_m.gguf Q4_K_M\n" in text
    assert argv(text)["--model"] == "tiny-llama-q4_k_m.gguf"


def test_transformers_gets_what_was_planned(make_plan: MakePlan) -> None:
    plan = make_plan("org/tiny@v2", scheme="nf4", engine="transformers", attention="flash")
    calls = {
        ast.unparse(node.func): {
            key.arg: ast.unparse(key.value) for key in node.keywords if key.arg
        }
        for node in ast.walk(ast.parse(exporters.export(plan, "transformers")))
        if isinstance(node, ast.Call)
    }
    assert calls["AutoModelForCausalLM.from_pretrained"] == {
        "revision": "'v2'",
        "dtype": "torch.bfloat16",
        "quantization_config": "BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type='nf4', "
        "bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16)",
        "attn_implementation": "'flash_attention_2'",
        "device_map": "'cuda'",
    }
    assert calls["model.generate"] == {"max_new_tokens": "256", "prefill_chunk_size": "512"}


def test_transformers_reads_a_gguf_file_from_its_folder(make_plan: MakePlan) -> None:
    program = exporters.export(make_plan("/m/x y/tiny.gguf"), "transformers")
    assert program.count('"/m/x y"') == program.count('gguf_file="tiny.gguf"') == 2  # tokenizer too


def test_a_ray_config_has_known_fields_only(make_plan: MakePlan) -> None:
    config = config_of(exporters.export(make_plan(), "ray"))
    loading = {f"model_loading_config.{key}" for key in config["model_loading_config"]}
    assert loading | set(config) <= known("ray").names | {"model_loading_config"}
    assert config["accelerator_type"] == "H100"
    assert config["model_loading_config"] == {"model_id": "tiny-llama", "model_source": "org/tiny"}


def test_a_kserve_spec_has_known_fields_only(make_plan: MakePlan) -> None:
    plan = make_plan("org/tiny@v2", tensor_parallel=2, pipeline_parallel=2)
    manifest = yaml.safe_load(exporters.export(plan, "kserve"))
    spec = manifest["spec"]
    nested = {
        f"{key}.{inner}" for key in ("model", "router", "parallelism") for inner in spec.pop(key)
    }
    assert nested | set(spec) <= known("kserve").names
    container = spec["template"]["containers"][0]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "4"}
    assert "hf://org/tiny:v2" in exporters.export(plan, "kserve")


@pytest.mark.parametrize("source", ["/models/tiny", "tiny", "./tiny", "../a", "a/b c", "x/$(y)"])
def test_a_cluster_cannot_read_this_machine(make_plan: MakePlan, source: str) -> None:
    with pytest.raises(InputError, match="A cluster cannot read"):
        exporters.export(make_plan(source), "kserve")


def test_a_hostile_name_stays_out_of_the_controllers_script(make_plan: MakePlan) -> None:
    plan = make_plan()
    model = replace(plan.recipe.model, name='x" $(touch y) "')
    text = exporters.export(replace(plan, recipe=replace(plan.recipe, model=model)), "kserve")
    assert yaml.safe_load(text)["spec"]["model"]["name"] == "x-touch-y"


REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("vllm", {"scheme": "nf4"}, "vllm 0.33.0 has no nf4 weights"),
    ("ray", {"scheme": "int8"}, "has no int8 weights"),
    ("vllm", {"source": "a.gguf"}, "reads no GGUF"),
    ("vllm", {"kv_dtype": "q8_0"}, "has no --kv-cache-dtype 'q8_0'"),
    ("vllm", {"kv_dtype": "fp32"}, "has no --kv-cache-dtype 'fp32'"),
    ("vllm", {"others": ("dms",)}, "vllm has no 'dms'"),
    ("vllm", {"device": M3}, "does not run on 'm3-max-128gb'"),
    ("vllm", {"source": "a\0b"}, "The model's source holds the character"),
    ("vllm", {"dtype": "fp64"}, "No engine computes in 'fp64'"),
    ("sglang", {"scheme": "int8"}, "has no int8 weights"),
    ("sglang", {"scheme": "nf4", "device": CPU}, "has no nf4 weights"),
    ("sglang", {"kv_dtype": "fp16"}, "has no --kv-cache-dtype 'fp16'"),
    ("sglang", {"others": ("camelot",)}, "sglang has no 'camelot'"),
    ("llama.cpp", {"scheme": "nf4"}, "has no nf4 weights"),
    ("llama.cpp", {"kv_dtype": "fp8"}, "has no --cache-type-k 'fp8'"),
    ("llama.cpp", {"kv_dtype": "q8_0", "attention": "eager"}, "only with flash attention"),
    ("llama.cpp", {"tensor_parallel": 2, "pipeline_parallel": 2}, "not both"),
    ("llama.cpp", {"others": ("larimar",)}, "has no 'larimar'"),
    ("transformers", {"kv_dtype": "fp16"}, "no fp16 KV entries"),
    ("transformers", {"kv_dtype": "fp8", "family": "gemma3_text"}, "no fp8 KV entries"),
    ("transformers", {"tensor_parallel": 2}, "one device"),
]


@pytest.mark.parametrize(("target", "changes", "reason"), REFUSED)
def test_what_an_engine_lacks_is_refused(
    make_plan: MakePlan, target: str, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(InputError, match=reason):
        exporters.export(make_plan(**changes), target)


@pytest.mark.parametrize("target", ["vllm", "sglang", "transformers", "ray", "kserve"])
def test_types_of_llama_cpp_are_its_own(make_plan: MakePlan, target: str) -> None:
    with pytest.raises(InputError, match="no q4_k weights"):
        exporters.export(stored(make_plan(), Storage("q4_k", 4.5)), target)


@pytest.mark.parametrize("target", ["vllm", "sglang"])
def test_a_quantized_checkpoint_is_said_to_be_one(make_plan: MakePlan, target: str) -> None:
    text = exporters.export(stored(make_plan(), Storage("fp8", 8)), target)
    assert "# fp8 weights: " in text
    assert "--quantization" not in argv(text)


@pytest.mark.parametrize(
    ("target", "weights", "method"),
    [
        *((target, "fp8", "fp8_per_channel") for target in VLLM_BASED),
        ("vllm", "mxfp4", "mxfp4"),
    ],
)
def test_vllm_makes_the_format_that_was_asked_for(
    make_plan: MakePlan, target: str, weights: str, method: str
) -> None:
    text = exporters.export(converted(make_plan(), weights), target)
    assert options(text, target)["quantization"] == method
    assert method in known("vllm").choices["--quantization"]
    assert "from the checkpoint's config" not in text


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("fp8", {"--quantization": "fp8"}),
        ("nf4", {"--quantization": "bitsandbytes", "--load-format": "bitsandbytes"}),
    ],
)
def test_sglang_makes_the_format_that_was_asked_for(
    make_plan: MakePlan, weights: str, expected: dict[str, str]
) -> None:
    text = exporters.export(converted(make_plan(), weights), "sglang")
    found = argv(text)
    assert {name: found[name] for name in found if name[2:] in ("quantization", "load-format")} == (
        expected
    )
    assert "from the checkpoint's config" not in text


@pytest.mark.parametrize(
    ("target", "weights", "changes"),
    [
        *((target, "int4", {}) for target in [*VLLM_BASED, "sglang", "transformers"]),
        ("vllm", "int8", {}),
        ("sglang", "nf4", {"device": CPU}),
        ("sglang", "fp8", {"source": "/m/tiny.gguf"}),
        ("transformers", "fp8", {}),
        ("transformers", "fp8", {"source": "/m/tiny.gguf"}),
    ],
)
def test_plain_weights_are_never_served_for_others(
    make_plan: MakePlan, target: str, weights: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(InputError, match=f"makes no {weights} weights of a plain checkpoint: name"):
        exporters.export(converted(make_plan(**changes), weights), target)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("kind", ["cuda", "rocm"])
def test_what_an_engine_is_said_to_make_is_served(
    make_plan: MakePlan, engine: Engine, kind: DeviceKind
) -> None:
    """A search offers these, and its best is to be exported."""
    device = replace(make_plan().recipe.device, kind=kind)
    for weights in set(ENGINES[engine].makes(device)) - set(DTYPE_BYTES):
        assert exporters.export(converted(make_plan(device=device), weights), engine)


@pytest.mark.parametrize("target", ["vllm", "sglang", "llama.cpp"])
def test_a_length_beyond_the_models_context_is_warned_of(make_plan: MakePlan, target: str) -> None:
    plan = make_plan()
    tokens = plan.recipe.workload.context_tokens
    for most_tokens in (tokens - 1, tokens):
        model = replace(plan.recipe.model, max_context_tokens=most_tokens)
        text = exporters.export(with_model(plan, model), target)
        assert ("beyond the model's own context" in text) == (tokens > most_tokens)


def test_a_converted_plan_is_one_after_json(make_plan: MakePlan) -> None:
    plan = converted(make_plan(), "fp8")
    again = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert again.recipe.model.converted == "fp8"
    assert exporters.export(again, "vllm") == exporters.export(plan, "vllm")


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_what_bitsandbytes_makes_is_planned_where_it_still_is(engine: str) -> None:
    has_it = "bitsandbytes" in known(engine).choices["--quantization"]
    assert ("nf4" in ENGINES[engine].weights) == has_it


@pytest.mark.parametrize(
    ("weights", "file_type"), [("iq3_m", "IQ3_M"), ("q3_k_l", "Q3_K_L"), ("mxfp4", "MXFP4_MOE")]
)
def test_llama_cpp_gets_the_mixture_that_was_planned(
    make_plan: MakePlan, weights: str, file_type: str
) -> None:
    text = exporters.export(mixed(make_plan(), weights), "llama.cpp")
    assert f"llama-quantize tiny-llama-bf16.gguf tiny-llama-{weights}.gguf {file_type}" in text
    assert argv(text)["--model"] == f"tiny-llama-{weights}.gguf"


def test_llama_cpp_makes_another_file_of_one(make_plan: MakePlan) -> None:
    text = exporters.export(mixed(make_plan("/m/tiny.gguf"), "q4_0"), "llama.cpp")
    assert "llama-quantize --allow-requantize /m/tiny.gguf tiny-llama-q4_0.gguf Q4_0" in text
    assert argv(text)["--model"] == "tiny-llama-q4_0.gguf"


@pytest.mark.parametrize("weights", ["int4", "mxfp4"])
def test_llama_cpp_refuses_what_another_engine_planned(make_plan: MakePlan, weights: str) -> None:
    with pytest.raises(InputError, match=f"reads no {weights} checkpoint"):
        exporters.export(converted(make_plan(), weights), "llama.cpp")


def test_llama_cpp_refuses_another_quantized_checkpoint(make_plan: MakePlan) -> None:
    with pytest.raises(InputError, match=r"llama\.cpp reads no int4 checkpoint"):
        exporters.export(stored(make_plan(), Storage("int4", 4)), "llama.cpp")


def test_the_reader_is_told_what_to_doubt(make_plan: MakePlan) -> None:
    text = exporters.export(make_plan("", budget_bytes=1), "vllm")
    assert "# WARNING: this plan does not fit its budget." in text
    assert "# The figures are those of ullage" in text
    assert "# The plan names no weights" in text
    assert "# The figures" not in exporters.export(make_plan(engine="vllm"), "vllm")


def converted(plan: Plan, weights: str) -> Plan:
    """`plan` with its weights given a checkpoint's format, as --weights does."""
    return with_model(plan, as_checkpoint(plan.recipe.model, weights))


def mixed(plan: Plan, weights: str) -> Plan:
    """`plan` with its weights as llama.cpp's mixture, as --weights does."""
    return with_model(plan, as_gguf(plan.recipe.model, weights))


def with_model(plan: Plan, model: ModelSpec) -> Plan:
    return replace(plan, recipe=replace(plan.recipe, model=model))


def stored(plan: Plan, storage: Storage) -> Plan:
    """`plan` with its linear weights in `storage`."""
    model: ModelSpec = plan.recipe.model
    tensors = tuple(
        replace(tensor, storage=storage) if tensor.role == "linear" else tensor
        for tensor in model.tensors
    )
    return with_model(plan, replace(model, tensors=tensors))


SOURCES = ["org/tiny", "org/tiny@v1", "-rf", "/m/x y", "", "/m/$(x)'\"\n#"]
plain = st.fixed_dictionaries(
    {
        "source": st.sampled_from(SOURCES),
        "device": st.sampled_from([H100, CPU, MI300X]),
        "budget_bytes": st.integers(1, 80 * GIB),
        "work": st.builds(Workload, st.integers(1, 9999), st.integers(1, 999), st.integers(1, 300)),
        "family": st.sampled_from(["llama", "gemma3_text", "gpt2"]),
        "engine": st.sampled_from(get_args(Engine)),
        "attention": st.sampled_from(get_args(Attention)),
        "prefill_chunk": st.integers(0, 9999),
        "max_num_seqs": st.none() | st.integers(1, 999),
    }
)
# What some engine lacks: as a rule none of these, or a few.
odd = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "source": st.text(max_size=12) | st.just("/m/x y.gguf"),
        "scheme": st.sampled_from(["int8", "nf4"]),
        "others": st.just(("dms",)),
        "device": st.just(M3),
        "dtype": st.sampled_from(list(DTYPE_BYTES)),
        "kv_dtype": st.sampled_from(list(KV_BITS)),
        "tensor_parallel": st.sampled_from([2, 8]),
        "pipeline_parallel": st.just(3),
    },
)
storages = st.none() | st.sampled_from(["fp8", "int4", "nf4", "q4_k", "mxfp4", "iq2_xxs", "odd"])


@settings(suppress_health_check=[HealthCheck.too_slow])
@given(changes=plain, odd=odd, storage=storages, target=st.sampled_from(exporters.names()))
def test_any_plan_exports_to_what_parses_or_to_our_error(
    make_plan: MakePlan,
    changes: dict[str, Any],
    odd: dict[str, Any] | None,
    storage: str | None,
    target: str,
) -> None:
    plan = make_plan(**changes | (odd or {}))
    if storage is not None:
        plan = stored(plan, Storage(storage, 4))
    try:
        text = exporters.export(plan, target)
    except InputError as refusal:
        text, reason = "", str(refusal)
    if not text:
        assert len(reason.splitlines()) == 1
        return
    text.encode()
    if target in ("ray", "kserve"):
        assert options(text, target)["max_model_len"] == str(plan.recipe.workload.context_tokens)
    elif target == "transformers":
        ast.parse(text)
    else:
        names = {name for name in argv(text) if name}
        assert names <= known(target).names


# Not nf4: on some CPUs bitsandbytes repacks weights, and fails at ones as narrow as these.
@pytest.mark.parametrize("scheme", ["none", "int8"])
def test_the_program_for_transformers_runs(
    make_plan: MakePlan, model_folder: Callable[[str], Path], scheme: str, capsys: Any
) -> None:
    plan = make_plan(
        str(model_folder("llama")), scheme, device=CPU, work=Workload(8, 4), dtype="fp32",
        kv_dtype="fp32", prefill_chunk=2,
    )  # fmt: skip
    exec(compile(exporters.export(plan, "transformers"), "exported.py", "exec"), {})
    assert capsys.readouterr().out.strip()


@pytest.mark.parametrize(("kind", "counted"), [("cuda", True), ("cpu", False)])
def test_an_engines_own_plan_is_named_where_there_is_one(
    make_plan: MakePlan, kind: str, counted: bool
) -> None:
    plan = make_plan(device=Device("some", kind, 80 * GIB))  # type: ignore[arg-type]
    written = exporters.export(plan, "vllm")
    assert "The figures are those of ullage" in written
    assert ("`ullage plan --engine vllm` counts them" in written) == counted
