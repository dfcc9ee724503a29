"""The cliff: the last size that fits, to the token and to the sequence."""

from collections.abc import Callable
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, build_plan
from ullage.planner.memory import peak_bytes
from ullage.specs.calibration import Calibration
from ullage.specs.device import Device
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.workload import Execution, Workload
from ullage.units import GIB, MIB

TinySpec = Callable[..., ModelSpec]
CPU = Device("cpu", "cpu", 64 * GIB)

recipes = st.builds(
    lambda model, work, execution, scheme: (
        model,
        work,
        execution,
        (TechniqueChoice("quantization", {"scheme": scheme}),),
    ),
    st.sampled_from(["llama", "gemma2", "qwen3", "phi3"]),
    st.builds(Workload, st.integers(1, 3000), st.integers(1, 300), st.integers(1, 20)),
    st.builds(
        Execution,
        engine=st.sampled_from(["ullage", "transformers"]),
        attention=st.sampled_from(["eager", "sdpa"]),
        kv_dtype=st.sampled_from(["fp32", "bf16"]),
        prefill_chunk=st.sampled_from([0, 32, 512]),
    ),
    st.sampled_from(["none", "int8", "nf4"]),
)
budgets = st.integers(440 * MIB, 900 * MIB)  # the runtime alone is 406 MB


def resized(made: Recipe, **sizes: int) -> Recipe:
    return replace(made, workload=replace(made.workload, **sizes))


@given(recipes, budgets)
def test_the_cliff_is_exact_in_both_directions(
    tiny_spec: TinySpec, parts: tuple[str, Workload, Execution, tuple[()]], budget_bytes: int
) -> None:
    family, *rest = parts
    made = Recipe(tiny_spec(family), CPU, *rest)
    cliff = build_plan(made, budget_bytes).cliff
    assert cliff.max_model_len is not None
    assert cliff.max_num_seqs is not None
    longest = cliff.max_model_len - made.workload.output_tokens
    if cliff.max_model_len:
        assert peak_bytes(resized(made, prompt_tokens=longest)) <= budget_bytes
        assert peak_bytes(resized(made, prompt_tokens=longest + 1)) > budget_bytes
    else:
        assert peak_bytes(resized(made, prompt_tokens=1)) > budget_bytes
    if cliff.max_num_seqs:
        assert peak_bytes(resized(made, sequences=cliff.max_num_seqs)) <= budget_bytes
    assert peak_bytes(resized(made, sequences=cliff.max_num_seqs + 1)) > budget_bytes


@given(recipes, budgets)
def test_a_plan_fits_when_it_is_on_this_side_of_the_cliff(
    tiny_spec: TinySpec, parts: tuple[str, Workload, Execution, tuple[()]], budget_bytes: int
) -> None:
    family, work, *rest = parts
    plan = build_plan(Recipe(tiny_spec(family), CPU, work, *rest), budget_bytes)
    assert plan.fits == (plan.peak_bytes <= budget_bytes)
    assert plan.fits == (work.context_tokens <= plan.cliff.max_model_len)
    assert plan.fits == (work.sequences <= plan.cliff.max_num_seqs)


def test_no_size_fits_when_the_weights_do_not(tiny_spec: TinySpec) -> None:
    made = Recipe(tiny_spec("llama"), CPU, Workload(10, 10), Execution())
    cliff = build_plan(made, 1 * MIB).cliff
    assert (cliff.max_model_len, cliff.max_num_seqs) == (0, 0)


def test_windows_and_chunks_leave_no_cliff_in_length(tiny_spec: TinySpec) -> None:
    """Where every layer slides and the prompt comes in chunks, nothing grows with its length."""
    made = Recipe(tiny_spec("mistral"), CPU, Workload(1000, 10), Execution(prefill_chunk=32))
    cliff = build_plan(made, 450 * MIB).cliff
    assert cliff.max_model_len is None
    assert 1 <= cliff.max_num_seqs < 1 << 39


def test_a_calibration_moves_the_cliff(tiny_spec: TinySpec) -> None:
    made = Recipe(tiny_spec("llama"), CPU, Workload(100, 10), Execution())
    lighter = Calibration("cpu", "ullage", {"runtime_bytes": 200_000_000}, {})
    before = build_plan(made, 450 * MIB).cliff
    after = build_plan(made, 450 * MIB, lighter).cliff
    assert after.max_model_len > 2 * before.max_model_len
    assert after.max_num_seqs > 2 * before.max_num_seqs
