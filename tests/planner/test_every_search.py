"""The search and the advice for every engine: what they return fits, is not beaten, is the same."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage import Recipe, default_execution, find_device, resolve
from ullage.errors import DoesNotFit
from ullage.planner.candidates import Candidate
from ullage.planner.engines import ENGINES
from ullage.planner.explore import cheapest_change, explore
from ullage.planner.levers import levers_of
from ullage.planner.memory import peak_bytes, phase_footprints
from ullage.planner.search import Freedom
from ullage.specs.workload import Engine, Workload
from ullage.units import GIB, MIB

CARD = find_device("rtx-4090")
FREE = Freedom()
MODELS = ("smollm2-135m", "llama-3.2-1b", "gemma-3-1b")
every_engine = pytest.mark.parametrize("engine", ENGINES)
works = st.builds(Workload, st.integers(1, 20_000), st.integers(1, 500), st.integers(1, 40))


def recipe(engine: Engine, model: str, work: Workload) -> Recipe:
    return Recipe(resolve(model), CARD, work, default_execution(CARD, engine))


def merits(found: Candidate) -> tuple[float, float, float]:
    """Memory, loss and seconds of the asked workload: less is better of each."""
    loss = inf if found.cost_percent is None else found.cost_percent
    latency, work = found.latency, found.recipe.workload
    assert latency is not None
    whole_s = work.sequences * latency.ttft_s + work.output_tokens / latency.sequence_tokens_per_s
    return found.peak_bytes, loss, whole_s


@every_engine
@given(
    st.sampled_from(MODELS), works, st.integers(700, 8000), st.sampled_from(["context", "latency"])
)
@settings(max_examples=5)
def test_only_what_fits_is_ranked_and_nothing_that_fits_is_left_out(
    engine: Engine, model: str, work: Workload, budget_mib: int, goal: str
) -> None:
    explored = explore(recipe(engine, model, work), budget_mib * MIB, goal, FREE)  # type: ignore[arg-type]
    fitting = [found for found in explored.every if found.peak_bytes <= budget_mib * MIB]
    ranked = {found.changes for found in explored.ranked}
    assert ranked == {found.changes for found in fitting}
    for found in explored.ranked[:5]:
        assert peak_bytes(found.recipe) == found.peak_bytes <= budget_mib * MIB


@every_engine
def test_the_same_question_has_the_same_answer(engine: Engine) -> None:
    asked = recipe(engine, "llama-3.2-1b", Workload(4000, 96, 4))
    first, second = (explore(asked, 4 * GIB, "concurrency", FREE) for _ in range(2))
    assert first == second


@every_engine
@given(st.sampled_from(MODELS), works)
@settings(max_examples=4)
def test_nothing_beats_the_front_and_all_else_is_beaten(
    engine: Engine, model: str, work: Workload
) -> None:
    explored = explore(recipe(engine, model, work), None, "latency", FREE)
    front = [merits(found) for found in explored.front]
    here = [found for found in explored.every if not found.hardware]
    compared = here if any(found.fits for found in here) else explored.every
    for found in compared:
        assert any(as_good(other, merits(found)) for other in front)
    for place, mine in enumerate(front):
        assert not any(as_good(other, mine) for other in front[:place] + front[place + 1 :])


def as_good(other: tuple[float, ...], mine: tuple[float, ...]) -> bool:
    """In all three; seconds are summed up in another order than the search does."""
    return all(a <= b * (1 + 1e-12) for a, b in zip(other, mine, strict=True))


def singles(asked: Recipe) -> dict[str, tuple[int, str]]:
    """Every single change: its peak, and the lever that it moves."""
    found = {}
    levers = levers_of(asked, FREE)
    for lever in levers:
        for setting in lever.settings[1:]:
            made = asked
            for other in levers:
                made = (setting if other is lever else other.settings[0]).apply(made)
            made = ENGINES[asked.execution.engine].settle(made)
            found[setting.typed] = (peak_bytes(made), lever.name)
    return found


@every_engine
@given(st.sampled_from(MODELS), works, st.integers(0, 1000))
@settings(max_examples=5)
def test_the_cheapest_change_is_a_single_one_wherever_a_single_one_is_enough(
    engine: Engine, model: str, work: Workload, permille: int
) -> None:
    asked = recipe(engine, model, work)
    peaks = singles(asked)
    least = min(peak for peak, _ in peaks.values())
    most = peak_bytes(ENGINES[engine].settle(asked)) - 1
    budget_bytes = least + (max(least, most) - least) * permille // 1000
    found = cheapest_change(asked, budget_bytes, FREE)
    assert found.peak_bytes == peak_bytes(found.recipe) <= budget_bytes
    assert len(found.changes) == 1
    assert peaks[found.changes[0]][0] == found.peak_bytes


@every_engine
def test_a_budget_below_all_combinations_names_the_one_that_works(engine: Engine) -> None:
    asked = recipe(engine, "llama-3.2-1b", Workload(4000, 96, 4))
    with pytest.raises(DoesNotFit) as refused:
        cheapest_change(asked, 1, FREE)
    needed_bytes = refused.value.needed_bytes
    assert needed_bytes == min(c.peak_bytes for c in explore(asked, 1, "latency", FREE).every)
    assert cheapest_change(asked, needed_bytes, FREE).peak_bytes == needed_bytes


@every_engine
@pytest.mark.parametrize("model", ["llama-3.1-8b", "gemma-2-9b"])
def test_a_setting_moves_its_own_lever_alone(engine: Engine, model: str) -> None:
    """Chunk, limit, KV format and devices are a field of the execution each."""
    asked = recipe(engine, model, Workload(9000, 96, 2))
    fields = {
        "chunk": "prefill_chunk", "sequences": "max_num_seqs", "KV entries": "kv_dtype",
        "attention": "attention", "tensor parallel": "tensor_parallel",
    }  # fmt: skip
    for lever in levers_of(asked, FREE):
        for setting in lever.settings[1:]:
            made = setting.apply(asked)
            assert made.workload == asked.workload
            if lever.name in fields:
                field = fields[lever.name]
                changed = replace(asked.execution, **{field: getattr(made.execution, field)})
                assert made == replace(asked, execution=changed) != asked
                assert setting.typed.split()[1] == str(getattr(made.execution, field))


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@given(st.sampled_from(["llama-3.1-8b", "gemma-2-9b", "qwen3-30b-a3b"]), works)
@settings(max_examples=15)
def test_devices_together_hold_at_least_what_one_would(
    engine: Engine, model: str, work: Workload
) -> None:
    def held(**split: int) -> tuple[int, int]:
        asked = recipe(engine, model, work)
        asked = replace(asked, execution=replace(asked.execution, **split))
        decode = phase_footprints(ENGINES[engine].settle(asked))["decode"]
        return decode.weights_bytes, decode.kv_bytes

    weights_bytes, kv_bytes = held()
    for tensor_parallel in (2, 4, 8):
        part = held(tensor_parallel=tensor_parallel)
        assert part[0] * tensor_parallel >= weights_bytes
        # SGLang's sliding part is a fraction, of which each sequence loses the last byte
        assert (part[1] + work.sequences) * tensor_parallel >= kv_bytes
        assert part[0] < weights_bytes
        assert part[1] <= kv_bytes


@pytest.mark.parametrize("depth", [2, 3, 5])
def test_the_fullest_rank_of_sglang_holds_at_least_an_even_part(depth: int) -> None:
    """32 layers on five ranks are 6, 6, 7, 7 and 6: the first has the embedding, and fewer layers
    than the third. At 40 sequences of 8,192 tokens KV entries are what counts."""
    asked = recipe("sglang", "llama-3.1-8b", Workload(8000, 192, 40))
    spread = replace(asked, execution=replace(asked.execution, pipeline_parallel=depth))
    whole, part = (
        phase_footprints(ENGINES["sglang"].settle(made))["decode"] for made in (asked, spread)
    )
    assert part.kv_bytes == whole.kv_bytes // 32 * -(-32 // depth)
    assert part.kv_bytes * depth >= whole.kv_bytes
