"""What the planner adds to a diagnosis."""

from dataclasses import replace
from pathlib import Path

import pytest

from ullage.doctor.diagnosis import Change, Diagnosis, Run
from ullage.doctor.fit import plan_of, with_plan
from ullage.specs.sources import resolve
from ullage.units import GIB

# ullage's own engine is not among the logs, but its arithmetic is always there.
RUN = Run(model="HuggingFaceTB/SmolLM2-360M", dtype="bfloat16", max_model_len=8192)
NAMED = Diagnosis("", True, "ullage", total_bytes=24 * GIB, run=RUN)


def test_a_known_model_on_a_known_device_is_planned() -> None:
    plan = plan_of(NAMED)
    assert plan is not None
    assert plan.recipe.model.name == "smollm2-360m"
    assert plan.recipe.workload.context_tokens == 8192
    assert plan.budget_bytes == 24 * GIB
    assert f"{plan.cliff.max_model_len:,} tokens" in with_plan(NAMED).planned


@pytest.mark.parametrize(
    "unknown",
    [
        {"engine": "ollama"},
        {"engine": ""},
        {"total_bytes": None},
        {"run": Run()},
        {"run": Run(model="no/such-model")},
        {"run": Run(model="no/such-model-AWQ", quantization="awq")},
        {"run": replace(RUN, max_model_len=10**15)},
        {"engine_version": "x", "run": replace(RUN, model="")},
    ],
)
def test_what_is_not_known_is_not_planned(unknown: dict[str, object]) -> None:
    diagnosis = replace(NAMED, **unknown)  # type: ignore[arg-type]
    assert with_plan(diagnosis) == diagnosis


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ({"run": replace(RUN, tensor_parallel=2)}, "ullage runs on one device"),
        ({"run": replace(RUN, quantization="exl9")}, "no arithmetic for exl9 weights in ullage."),
        ({"run": replace(RUN, kv_dtype="turboquant_3bit")}, "no arithmetic for turboquant_3bit KV"),
        ({"engine_version": "99"}, "ullage 99 has no figures here"),
        ({"engine": "vllm", "run": replace(RUN, quantization="gptq")}, "gptq has several formats"),
        ({"engine": "vllm", "run": replace(RUN, quantization="bitsandbytes")}, "nf4 weights in"),
    ],
)
def test_what_has_no_plan_says_why(said: dict[str, object], why: str) -> None:
    diagnosis = replace(NAMED, **said)  # type: ignore[arg-type]
    assert plan_of(diagnosis) is None
    found = with_plan(diagnosis)
    assert found.planned.startswith("No plan: ")
    assert why in found.planned
    assert found == replace(diagnosis, planned=found.planned)


# GiB of weights in the catalog's own checkpoints, which configs of the hub make exact.
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize(
    ("model", "quantization", "same_as"),
    [
        ("Qwen/Qwen2.5-7B-Instruct-AWQ", "awq_marlin", ""),  # in the catalog as it is
        ("openai/gpt-oss-20b", "mxfp4", ""),
        ("RedHatAI/Llama-3.3-70B-Instruct-quantized.w8a8", "compressed-tensors", ""),
        ("someone/Qwen2.5-7B-Instruct-AWQ", "awq", "qwen2.5-7b-instruct-awq"),
        ("/models/Qwen2.5-7B-Instruct-GPTQ-Int4", "gptq", "qwen2.5-7b-instruct-gptq-int4"),
        ("me/Qwen2.5-7B-Instruct-quantized.w4a16", "compressed-tensors",
         "qwen2.5-7b-instruct-w4a16"),
        ("me/Qwen2.5-7B-Instruct-quantized.w8a8", "compressed-tensors", "qwen2.5-7b-instruct-w8a8"),
        ("me/Qwen3-8B-FP8", "fp8", "qwen3-8b-fp8"),
        ("qwen3-8b", "awq", "qwen3-8b-awq"),
    ],
)  # fmt: skip
def test_a_quantized_checkpoint_is_planned_in_its_format(
    engine: str, model: str, quantization: str, same_as: str
) -> None:
    run = Run(model, "float16", quantization=quantization, max_model_len=4096)
    diagnosis = Diagnosis("", True, engine, total_bytes=160 * GIB, run=run)
    plan = plan_of(diagnosis)
    assert plan is not None, with_plan(diagnosis).planned
    name = same_as or model
    exact = plan_of(replace(diagnosis, run=replace(run, model=name)))
    assert exact is not None
    assert plan.share.weights_bytes == pytest.approx(exact.share.weights_bytes, rel=0.01)
    plain = resolve(name).parameters * 2
    assert plan.share.weights_bytes < 0.65 * plain


def test_a_path_in_a_log_is_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "smollm2-360m").mkdir()  # a folder that is called as a model is
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert plan_of(NAMED) is not None
    for name in (str(tmp_path), str(tmp_path / "config.json"), "config.json", "."):
        assert plan_of(replace(NAMED, run=replace(RUN, model=name))) is None


def test_a_request_that_does_not_fit_gets_the_longest_that_does() -> None:
    first = Change("--max-num-seqs 1", "less at once")
    failed = replace(NAMED, total_bytes=int(1.35 * GIB), changes=(first,))
    plan = plan_of(failed)
    assert plan is not None
    assert plan.cliff.max_model_len in range(1, 8192)
    longest = f"--max-model-len {plan.cliff.max_model_len}"
    assert [change.flags for change in with_plan(failed).changes] == [first.flags, longest]


def test_a_length_that_the_log_itself_gives_is_not_contradicted() -> None:
    said = Change("--max-model-len 4096", "the engine's estimate")
    failed = replace(NAMED, total_bytes=int(1.35 * GIB), changes=(said,))
    assert with_plan(failed).changes == (said,)
    assert with_plan(failed).planned


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Qwen/Qwen2.5-7B-Instruct", "qwen2.5-7b-instruct"),  # lies over the base model's config
        ("meta-llama/Meta-Llama-3.1-8B", "meta-llama-3.1-8b"),  # an alias
        ("Qwen3 1.7B", "qwen3-1.7b"),  # as GGUF files call it
    ],
)
def test_a_log_may_call_a_model_by_any_name_of_the_catalog(name: str, known: str) -> None:
    plan = plan_of(replace(NAMED, run=Run(model=name, dtype="bfloat16", max_model_len=2048)))
    assert plan is not None
    assert plan.recipe.model.name == known


def test_a_pool_of_nothing_holds_no_fraction_of_a_request() -> None:
    run = Run("qwen2.5-7b-instruct", "bfloat16", max_model_len=8192, utilization=0.6)
    found = with_plan(Diagnosis("", True, "vllm", total_bytes=int(23.64 * GIB), run=run))
    assert found.planned == "By the plan, qwen2.5-7b-instruct leaves nothing for KV entries."


def test_a_pool_that_does_not_fit_is_not_called_left() -> None:
    run = Run("qwen3-8b", "bfloat16", quantization="q4_k_m", max_model_len=40960)
    found = with_plan(Diagnosis("", True, "llama.cpp", total_bytes=8 * GIB, run=run))
    assert "wants 5.62 GiB of KV entries for 40,960 tokens, which do not fit" in found.planned
    assert "at once" not in found.planned
