"""The practice that planning comes from, held to our own figures; docs/planning.md tells it."""

import pytest

from ullage import Plan, Recipe, build_plan, default_execution, find_device, resolve
from ullage.planner.candidates import Candidate
from ullage.planner.explore import cheapest_change, explore
from ullage.planner.search import Freedom
from ullage.specs.workload import Workload
from ullage.techniques import choice_of, parse
from ullage.units import GIB

NF4, INT8 = "quantization:scheme=nf4", "quantization:scheme=int8"
DMS, CAMELOT = "dms:kept=0.125", "camelot:slots=1024"


def recipe(model: str, device: str, tokens: int, sequences: int, *techniques: str) -> Recipe:
    place = find_device(device)
    chosen = tuple(choice_of(parse(text)) for text in techniques)
    work = Workload(tokens - 256, 256, sequences)
    return Recipe(resolve(model), place, work, default_execution(place), chosen)


def planned(model: str, device: str, tokens: int, sequences: int, *techniques: str) -> Plan:
    return build_plan(recipe(model, device, tokens, sequences, *techniques))


def change(model: str, device: str, tokens: int, sequences: int = 1) -> Candidate:
    return cheapest_change(recipe(model, device, tokens, sequences), None, Freedom())


@pytest.mark.parametrize("model", ["qwen3-4b", "mistral-7b-v0.3", "llama-2-7b"])
def test_up_to_7b_narrow_weights_come_first(model: str) -> None:
    """On 8 GB at a usual length the weights are most of it, and nothing but them is enough."""
    tokens = min(8192, resolve(model).max_context_tokens)
    bare = planned(model, "rtx-4060", tokens, 1)
    assert not bare.fits
    assert bare.phases["decode"].weights_bytes > 5 * bare.phases["decode"].kv_bytes
    assert not planned(model, "rtx-4060", tokens, 1, DMS).fits
    assert planned(model, "rtx-4060", tokens, 1, NF4).fits
    assert change(model, "rtx-4060", tokens).changes[0].startswith("--weights")


def test_but_the_length_decides_not_the_size() -> None:
    """Against the practice: 3B at 128K tokens is KV entries, and narrower or fewer are enough."""
    size = ("llama-3.2-3b", "rtx-4080", 131_072, 1)
    bare = planned(*size)
    assert not bare.fits
    assert bare.phases["decode"].kv_bytes > 2 * bare.phases["decode"].weights_bytes
    assert not planned(*size, NF4).fits
    assert planned(*size, DMS).fits
    assert change(*size).changes == ("--kv-cache-dtype int8",)


@pytest.mark.parametrize("techniques", [(NF4, DMS), (NF4, CAMELOT)])
def test_above_7b_sparse_kv_or_a_memory_is_what_makes_a_batch_fit(
    techniques: tuple[str, ...],
) -> None:
    """14B, four sequences of 32K on 24 GB: narrow weights alone are not enough, nor sparse KV."""
    size = ("qwen3-14b", "rtx-4090", 32_768, 4)
    assert not planned(*size, NF4).fits
    assert not planned(*size, techniques[1]).fits
    assert planned(*size, *techniques).fits


def test_13b_on_24_gb_takes_4_bits_and_sparse_kv_for_eight() -> None:
    assert planned("llama-2-13b", "rtx-3090", 4096, 1, NF4).fits  # one alone needs no more
    size = ("llama-2-13b", "rtx-3090", 4096, 8)
    assert not planned(*size, NF4).fits
    both = planned(*size, NF4, DMS)
    assert both.peak_bytes == pytest.approx(13.6 * GIB, rel=0.02)
    assert both.cliff.max_num_seqs == 21
    assert change(*size).changes == ("--weights nf4", "--kv-cache-dtype int8")


def test_32b_on_24_gb_takes_4_bits_and_sparse_kv_for_32k() -> None:
    size = ("qwen3-32b", "rtx-4090", 32_768, 1)
    four_bit = planned(*size, NF4)
    assert not four_bit.fits
    assert four_bit.cliff.max_model_len == pytest.approx(19_900, rel=0.05)
    assert not planned(*size, INT8, DMS).fits
    both = planned(*size, NF4, DMS)
    assert both.fits
    assert both.cliff.max_model_len is not None
    assert both.cliff.max_model_len > 130_000


def test_24b_with_4_bits_and_sparse_kv_on_one_40_gb_a100() -> None:
    """With our figures: 4 or 8 bits alone are enough for one sequence; the sparsity is what makes
    of three or five sequences thirty-six."""
    bare = planned("mistral-small-24b", "a100-40gb", 32_768, 1)
    assert not bare.fits
    eight, four, both = (
        planned("mistral-small-24b", "a100-40gb", 32_768, 1, *chosen)
        for chosen in ((INT8,), (NF4,), (NF4, DMS))
    )
    assert eight.fits
    assert [plan.cliff.max_num_seqs for plan in (eight, four, both)] == [3, 5, 36]
    assert not planned("mistral-small-24b", "a100-40gb", 32_768, 8, NF4).fits
    assert planned("mistral-small-24b", "a100-40gb", 32_768, 8, NF4, DMS).fits


def test_a_20b_of_today_needs_neither() -> None:
    """Against the practice: gpt-oss-20b comes in 4 bits, and half of its layers slide."""
    plan = planned("gpt-oss-20b", "a100-40gb", 131_072, 8)
    assert plan.fits
    assert plan.phases["decode"].weights_bytes == pytest.approx(12.8 * GIB, rel=0.01)


def test_widened_weights_are_slower_in_a_batch() -> None:
    """Against the practice: 4 bits save memory, not time, where a batch widens them first."""
    size = ("llama-3.1-8b", "h100", 4096, 16)
    bare, four_bit = planned(*size), planned(*size, NF4)
    assert bare.latency is not None
    assert four_bit.latency is not None
    assert four_bit.latency.tokens_per_s < bare.latency.tokens_per_s


def test_the_search_finds_the_practice_by_itself() -> None:
    explored = explore(
        recipe("mistral-small-24b", "a100-40gb", 32_768, 1), None, "concurrency", Freedom()
    )
    best = explored.ranked[0]
    assert best.changes[0] == "--weights nf4"
    assert any("dms" in change or "camelot" in change for change in best.changes)
