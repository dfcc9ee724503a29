"""What is advised: figures that follow from the log's own, and never an option that cannot help."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.doctor import Diagnosis, vllm_changes
from ullage.doctor.diagnosis import Evidence, Run, evidence
from ullage.doctor.fit import plan_of, with_plan
from ullage.doctor.frames import place_of
from ullage.doctor.learn import learn
from ullage.doctor.llamacpp_changes import fitting_cache, smaller_cache
from ullage.doctor.log import Found, Line, Log
from ullage.doctor.torch_cuda import Refusal, blame, remedy
from ullage.doctor.vllm_facts import GRAPHS, NON_TORCH, PROFILE_PEAK, Start
from ullage.specs.footprint import Term
from ullage.units import GIB, MIB

Diagnosed = Callable[[str], Diagnosis]


def place(text: str = "x") -> Found:
    found = Log([Line(1, text)]).first(r"\S+")
    assert found is not None
    return found


def refused(wanted: int, free: int, spare: int = 0, other: int = 0) -> Refusal:
    return Refusal(place(), wanted, free, 80 * GIB, 40 * GIB, spare, 0, other)


def start(**run: object) -> Start:
    settings = Run(**run)  # type: ignore[arg-type]
    return Start("0.19.0", settings, None, None, None, None, None, 80 * GIB, None, None)


sizes = st.integers(1, 100 * GIB)


@given(st.integers(1, 4096), sizes, sizes)
def test_fewer_rows_would_have_fitted(rows: int, wanted: int, free: int) -> None:
    change = vllm_changes.fewer_rows(rows, refused(wanted, free))
    fitting = int(change.flags.removeprefix("--max-num-seqs "))
    assert 1 <= fitting <= rows
    if wanted > free and fitting > 1:
        assert wanted * fitting // rows <= free
    if change.frees_bytes is not None:
        assert change.frees_bytes == wanted * (rows - fitting) // rows


@given(st.floats(0.05, 0.95), st.integers(0, 80 * GIB))
def test_a_raised_share_gives_what_is_missing_and_stays_below_the_most(
    share: float, missing: int
) -> None:
    changes = vllm_changes.raise_share(start(utilization=share), missing)
    if not changes:
        assert not 0 < missing <= (0.93 - share) * 80 * GIB
        return
    (change,) = changes
    written = float(change.flags.removeprefix("--gpu-memory-utilization "))
    assert share < written <= 0.95
    assert change.frees_bytes is not None
    assert change.frees_bytes >= missing
    assert (written - share) * 80 * GIB >= missing - 0.005 * 80 * GIB  # two digits are written


@given(st.floats(0.1, 0.99), sizes, sizes)
def test_a_lowered_share_leaves_what_was_missing(share: float, wanted: int, free: int) -> None:
    refusal = refused(wanted, free)
    for change in vllm_changes.lower_share(start(utilization=share), refusal):
        written = float(change.flags.removeprefix("--gpu-memory-utilization "))
        assert 0.05 < written < share
        assert change.frees_bytes is not None
        assert change.frees_bytes >= refusal.missing_bytes


def test_without_figures_the_advice_is_a_round_one() -> None:
    for run, refusal in ((start(), refused(2, 1)), (start(utilization=0.9), None)):
        (change,) = vllm_changes.lower_share(run, refusal)
        assert (change.flags, change.frees_bytes) == ("--gpu-memory-utilization 0.85", None)
    assert vllm_changes.raise_share(start(), GIB) == ()
    assert vllm_changes.shorter(0) == ()
    assert vllm_changes.shorter(7)[0].flags == "--max-model-len 7"


@pytest.mark.parametrize(
    ("kv_dtype", "wanted", "free", "why"),
    [
        ("", 4 * GIB, 2 * GIB, "halves the KV entries"),
        ("bfloat16", 4 * GIB, 2 * GIB - 1, "not enough alone"),
        ("auto", None, 0, "halves the KV entries"),
        ("fp8_e4m3", 4 * GIB, 2 * GIB, None),  # they are so already
    ],
)
def test_smaller_entries(kv_dtype: str, wanted: int | None, free: int, why: str | None) -> None:
    changes = vllm_changes.smaller_entries(start(kv_dtype=kv_dtype), wanted, free)
    assert bool(changes) is (why is not None)
    for change in changes:
        assert change.why.endswith(why or "")
        assert change.frees_bytes == (wanted and wanted // 2)


@pytest.mark.parametrize(
    ("run", "phase", "culprit", "flags"),
    [
        # quantized already: only more devices are left
        ({"quantization": "awq", "tensor_parallel": 4}, "load", "weights",
         ["--tensor-parallel-size 8"]),
        ({}, "load", "weights", ["--quantization fp8", "--tensor-parallel-size 2"]),
        ({"utilization": 0.9}, "profile", "graphs",
         ["--gpu-memory-utilization 0.87", "--max-cudagraph-capture-size 64", "--enforce-eager"]),
        # 2 GiB wanted and 1 free of a step of 8,192: half fits
        ({"prefill_chunk": 8192, "quantization": "fp8"}, "profile", "activation",
         ["--max-num-batched-tokens 4096", "--tensor-parallel-size 2"]),
        ({"prefill_chunk": 64, "utilization": 0.9}, "prefill", "activation",
         ["--gpu-memory-utilization 0.87"]),
        ({"prefill_chunk": 100, "utilization": 0.9}, "prefill", "logits",
         ["--max-num-batched-tokens 64", "--gpu-memory-utilization 0.87", "--max-logprobs 0"]),
        ({}, "decode", "activation",
         ["--gpu-memory-utilization 0.85", "--max-num-batched-tokens 2048"]),
    ],
)  # fmt: skip
def test_changes_by_stage(
    run: dict[str, object], phase: str, culprit: str, flags: list[str]
) -> None:
    changes = vllm_changes.changes_at(
        phase, culprit, start(**run), refused(2 * GIB, GIB)  # type: ignore[arg-type]
    )  # fmt: skip
    assert [change.flags for change in changes] == flags


@pytest.mark.parametrize(("seqs", "flag"), [(None, 128), (1024, 128), (128, 64), (3, 1), (1, 1)])
def test_a_smaller_start_never_asks_for_no_sequence(seqs: int | None, flag: int) -> None:
    changes = vllm_changes.smaller_start(start(max_num_seqs=seqs))
    assert changes[0].flags == f"--max-num-seqs {flag}"


@pytest.mark.parametrize(
    ("spare", "other", "culprit", "flags"),
    [
        (0, 0, None, []),
        (3 * GIB, 0, "fragmentation", ["PYTORCH_ALLOC_CONF=expandable_segments:True"]),
        # enough for what is missing, but less than was asked for
        (GIB, 0, None, ["PYTORCH_ALLOC_CONF=expandable_segments:True"]),
        (0, 5 * GIB, "other process", ["nvidia-smi"]),
        (0, GIB // 2, None, []),  # less than is missing
        (3 * GIB, 5 * GIB, "fragmentation",
         ["PYTORCH_ALLOC_CONF=expandable_segments:True", "nvidia-smi"]),
    ],
)  # fmt: skip
def test_what_explains_a_refusal(
    spare: int, other: int, culprit: str | None, flags: list[str]
) -> None:
    refusal = refused(2 * GIB, GIB, spare, other)
    assert blame(refusal)[0] == culprit
    assert bool(blame(refusal)[1]) is (culprit is not None)
    assert [change.flags for change in remedy(refusal)] == flags


def test_nothing_is_missing_where_enough_was_free() -> None:
    refusal = refused(GIB, 2 * GIB, 5 * MIB)
    assert refusal.missing_bytes == 0
    assert remedy(refusal) == ()
    assert [term.what for term in refusal.parts()] == [
        "tensors of all kinds, at the refusal", "reserved, unallocated, at the refusal",
        "outside of PyTorch, at the refusal",
    ]  # fmt: skip
    assert sum(term.nbytes for term in refusal.parts()) + 2 * GIB == 80 * GIB


@pytest.mark.parametrize(("kv_dtype", "offered"), [("f16", 1), ("", 1), ("q8_0", 0), ("q4_0", 0)])
def test_a_quantized_cache_is_not_quantized_again(kv_dtype: str, offered: int) -> None:
    changes = smaller_cache(Run(kv_dtype=kv_dtype), 64 * MIB)
    assert len(changes) == offered
    # q8_0 holds 32 numbers in 34 bytes, f16 in 64
    assert all(change.frees_bytes == 64 * MIB * 30 // 64 for change in changes)


@given(st.integers(256, 1 << 20), sizes, sizes)
def test_a_shorter_context_fits_by_the_figures(context: int, wanted: int, left: int) -> None:
    run = Run(max_model_len=context)
    for change in fitting_cache(run, wanted, left):
        assert change.frees_bytes is not None
        if "not enough" not in change.why:
            assert wanted - change.frees_bytes <= left
        if "longest" in change.why:
            assert int(change.flags.removeprefix("-c ")) % 256 == 0


FRAMES = {
    "_get_prompt_logprobs_dict": ("prefill", "logits"),
    "_dummy_sampler_run": ("profile", "logits"),
    "capture_one_batch_size": ("profile", "graphs"),
    "init_decode_cuda_graphs": ("profile", "graphs"),
    "determine_available_memory": ("profile", "activation"),
    "_allocate_kv_cache_tensors": ("profile", "kv"),
    "process_weights_after_loading": ("load", "weights"),
    "compute_logits": ("serve", "logits"),
    "eager_attention_forward": ("prefill", "activation"),
    "forward_decode": ("decode", "activation"),
    "generate": ("prefill", "activation"),
}


def traceback(*functions: str) -> Log:
    return Log([Line(n, f'File "x.py", line 9, in {name}') for n, name in enumerate(functions, 1)])


@pytest.mark.parametrize("function", FRAMES)
def test_a_frame_tells_the_stage(function: str) -> None:
    found = place_of(traceback("main", function, "forward"))
    assert found is not None
    assert (found.phase, found.culprit) == FRAMES[function]
    assert found.found.line.number == 2


@pytest.mark.parametrize(
    "functions", [(), ("main",), ("my_load_model_wrapper",), ("regenerate",), ("generated",)]
)
def test_a_frame_of_another_name_tells_nothing(functions: tuple[str, ...]) -> None:
    assert place_of(traceback(*functions)) is None


def test_the_innermost_frame_counts_whatever_the_order() -> None:
    outer_first = place_of(traceback("execute_model", "_dummy_run", "capture_model"))
    inner_first = place_of(traceback("capture_model", "_dummy_run", "execute_model"))
    assert outer_first is not None
    assert inner_first is not None
    assert outer_first.culprit == inner_first.culprit == "graphs"


def test_evidence_is_in_the_logs_order_once_and_short() -> None:
    late, early = (
        Found(Line(number, "y" * 999), place().match) for number in (9, 2)
    )  # fmt: skip
    shown = "y" * 238 + " …"
    assert evidence(late, None, early, late) == (Evidence(2, shown), Evidence(9, shown))


@given(st.text("0123456789. ", max_size=300).map(str.strip))
def test_evidence_never_cuts_a_figure_into_another(text: str) -> None:
    (line,) = evidence(Found(Line(1, text), place().match))
    assert len(line.text) <= 240
    if line.text != text:
        kept = line.text.removesuffix(" …")
        assert text.startswith(kept)
        assert text[len(kept)] == " " or " " not in kept


MEASURED = (
    Term("overhead", NON_TORCH, 300 * MIB, "measured", "line 1"),
    Term("activation", PROFILE_PEAK, 3 * GIB, "measured", "line 2"),
    Term("overhead", GRAPHS, GIB, "measured", "line 3"),
)
NAMED = Diagnosis(
    "", False, "vllm", "0.19.0", parts=MEASURED, total_bytes=80 * GIB,
    run=Run("Qwen/Qwen3-8B", "bfloat16", max_model_len=8192, max_num_seqs=256,
            prefill_chunk=8192, utilization=0.9),
)  # fmt: skip


def test_what_is_learned_makes_the_plan_what_was_measured() -> None:
    """The correction is what a plan lacks: planned part + (new constant - old) is measured."""
    from ullage.planner.constants import Constants

    plan, learned = plan_of(NAMED), learn(NAMED, "h100").constants
    assert plan is not None
    constants = Constants(plan.recipe)
    assert learned["non_torch_bytes"] == 300 * MIB
    pairs = (("graph_bytes", GIB, plan.share.graph_bytes),
             ("fixed_activation_bytes", 3 * GIB, plan.share.activation_bytes))  # fmt: skip
    for key, measured_bytes, planned_bytes in pairs:
        if key in constants:
            correction = learned[key] - int(constants[key].value)
            assert planned_bytes + correction == measured_bytes
    assert len(learned) > 1


def test_a_healthy_start_is_told_what_fits_and_is_advised_nothing() -> None:
    found = with_plan(NAMED)
    assert found.planned.startswith("By the plan, qwen3-8b leaves ")
    assert "requests of 8,192 tokens at once" in found.planned
    assert found.changes == ()


@pytest.mark.parametrize("total_bytes", [1, GIB, 4 * GIB])
def test_a_device_that_is_too_small_for_the_weights(total_bytes: int) -> None:
    found = with_plan(replace(NAMED, failed=True, total_bytes=total_bytes))
    assert not [change for change in found.changes if change.flags.startswith("--max-model-len")]
