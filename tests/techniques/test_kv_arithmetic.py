"""What DMS and CAMELoT would hold: shares of the dense KV entries, exact where they can be."""

from collections.abc import Callable
from dataclasses import replace
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, Recipe, TechniqueChoice, fit_run, resolve
from ullage.errors import TechniqueError
from ullage.planner.memory import phase_footprints
from ullage.planner.search import Freedom
from ullage.specs.blocks import BLOCK_TOKENS, block_bytes, full_layers
from ullage.specs.device import Device
from ullage.specs.survivors import SINKS
from ullage.specs.workload import Execution, Workload
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS
from ullage.units import GIB

TinySpec = Callable[..., ModelSpec]
GPU = Device("gpu", "cuda", 80 * GIB)
LLAMA = resolve("llama-3.1-8b")


def kv_bytes(spec: ModelSpec, tokens: int, sequences: int = 1, *chosen: TechniqueChoice) -> int:
    work = Workload(tokens - 1, 1, sequences)
    return phase_footprints(Recipe(spec, GPU, work, Execution(), chosen))["decode"].kv_bytes


def dms(kept: float, window: int = 256) -> TechniqueChoice:
    return TechniqueChoice("dms", {"kept": kept, "window": window})


def camelot(slots: int, segment: int = 512) -> TechniqueChoice:
    return TechniqueChoice("camelot", {"slots": slots, "segment": segment})


def live_tokens(technique: DMS, tokens: int) -> int:
    """What a head keeps on average, rounded up."""
    left = max(0, tokens - technique.window)
    return tokens - left + min(left, max(SINKS, ceil(technique.kept * left)))


@given(st.integers(2, 200_000), st.sampled_from([0.5, 0.25, 0.125]), st.integers(1, 9))
def test_dms_holds_what_its_heads_keep_and_at_most_a_block_more_each(
    tokens: int, kept: float, sequences: int
) -> None:
    """Its last; what it knows of its entries; and the tokens that are decided together."""
    held = kv_bytes(LLAMA, tokens, sequences, dms(kept))
    token_bytes = LLAMA.kv_width * 2
    live_bytes = sequences * 32 * live_tokens(DMS(kept, 256), tokens) * token_bytes
    state_bytes = 8 * (256 + 512) + (2 * 32 + 3) * 128 * 4 + 8 * 34 * 128 * 2
    together_bytes = 64 * 8 * block_bytes(LLAMA, "bf16") // 16
    slack = 32 * (8 * block_bytes(LLAMA, "bf16") + state_bytes + together_bytes)
    assert live_bytes - 32 * 8 * sequences * 512 <= held <= live_bytes + sequences * slack
    assert held <= kv_bytes(LLAMA, tokens, sequences) + sequences * 32 * state_bytes


def test_eight_times_needs_length() -> None:
    """Real compression is T / (w + (T - w) / 8): the window counts."""
    ratios = [
        kv_bytes(LLAMA, size) / kv_bytes(LLAMA, size, 1, dms(0.125)) for size in (4096, 131072)
    ]
    assert ratios[0] == pytest.approx(5.4, abs=0.2)
    assert ratios[1] == pytest.approx(7.8, abs=0.2)


@given(st.integers(1000, 100_000), st.integers(0, 100_000))
def test_what_a_sparse_row_lays_out_does_not_grow_with_the_prompt(tokens: int, more: int) -> None:
    def scratch_bytes(prompt_tokens: int) -> int:
        work = Workload(prompt_tokens, 100)
        dense, sparse = (
            phase_footprints(Recipe(LLAMA, GPU, work, Execution(), chosen))["prefill"]
            for chosen in ((), (dms(0.125),))
        )
        return sparse.activation_bytes - dense.activation_bytes

    assert 0 < scratch_bytes(tokens) == scratch_bytes(tokens + more)


@given(st.integers(1537, 10**6), st.integers(0, 10**6), st.sampled_from([60, 1020]))
def test_camelot_does_not_grow_beyond_its_slots(tokens: int, more: int, slots: int) -> None:
    """A segment, four first tokens and the slots; of each of these 12 B and its key again, turned,
    beside it; and angles, of a position and of queries."""
    chosen = camelot(slots)
    held = kv_bytes(LLAMA, tokens, 1, chosen)
    assert kv_bytes(LLAMA, tokens + more, 1, chosen) == held
    assert held == 32 * ((512 + 4 + slots) * 4096 + 8 * (12 + 256) * slots + 5 * 128 * 4)


def test_a_short_context_needs_no_bank() -> None:
    angles_bytes = 32 * 128 * 4
    for tokens in (2, 100, 512):
        held = kv_bytes(LLAMA, tokens, 1, camelot(1024))
        assert held == kv_bytes(LLAMA, tokens) + angles_bytes


def test_sliding_layers_stay_as_they_are(tiny_spec: TinySpec) -> None:
    spec = tiny_spec("gemma2")  # one full layer between two that slide over 6 tokens
    assert full_layers(spec) == 1
    tokens = 64 * BLOCK_TOKENS
    sliding_bytes = 2 * spec.num_kv_heads * block_bytes(spec, "bf16")
    held = kv_bytes(spec, tokens, 1, camelot(28, 128))
    bank_bytes = 10 * block_bytes(spec, "bf16") + 28 * (12 + 2 * spec.head_dim)
    assert held == sliding_bytes + spec.num_kv_heads * bank_bytes + 5 * spec.head_dim * 4


@pytest.mark.parametrize("chosen", [dms(0.5), camelot(64)])
def test_a_model_that_only_slides_has_nothing_to_give(
    tiny_spec: TinySpec, chosen: TechniqueChoice
) -> None:
    from ullage.techniques import create

    assert create(chosen).unsupported(tiny_spec("mistral")) is not None


def test_both_at_once_are_refused() -> None:
    with pytest.raises(TechniqueError, match="Only one technique"):
        kv_bytes(LLAMA, 100_000, 1, dms(0.125), camelot(64))


def test_a_run_refuses_what_is_planned_only(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen = camelot(64)
    monkeypatch.setattr(CAMELoT, "runs", False)
    made = Recipe(LLAMA, GPU, Workload(1, 1), Execution(), (chosen,))
    with pytest.raises(TechniqueError, match="can be planned, and is not run yet"):
        fit_run(made, GPU.memory_bytes, Freedom())
    assert fit_run(replace(made, techniques=()), GPU.memory_bytes, Freedom())


@pytest.mark.parametrize(
    "settings",
    [{"kept": 0}, {"kept": 1.1}, {"kept": "half"}, {"kept": True}, {"kept": float("nan")},
     {"window": 0}, {"window": 2.5}],
)  # fmt: skip
def test_settings_of_dms_that_cannot_be(settings: dict[str, object]) -> None:
    with pytest.raises(TechniqueError, match="dms: "):
        DMS(**settings)  # type: ignore[arg-type]
