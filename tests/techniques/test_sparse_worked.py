"""DMS and CAMELoT worked by hand on Llama-3.1-8B: 32 layers, 8 KV heads of 128, blocks of 16."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage import Recipe, TechniqueChoice, Workload, find_device, resolve
from ullage.errors import TechniqueError
from ullage.planner.memory import explain, phase_footprints
from ullage.specs.footprint import Footprint
from ullage.specs.workload import PHASES, Execution, PhaseName, Step
from ullage.techniques import create, parse
from ullage.techniques.base import Technique
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS

LLAMA = resolve("llama-3.1-8b")
BLOCK = 2 * 16 * 128 * 2  # bytes of K and V of a head in bf16
KV = 1 << 40  # more than anything that is taken away


def change(
    technique: Technique, phase: PhaseName, tokens: int, new: int = 1, sequences: int = 1
) -> Footprint:
    """What the technique makes of empty sums but for `KV`."""
    work = Step(phase, sequences, tokens, new, Execution())
    return technique.footprint(Footprint(kv_bytes=KV), LLAMA, work)


# a flag a head and token of the window and of a span; sums over queries, and how positions turn;
# the newest 8 queries, with cos and sin
STATE = 8 * (256 + 512) + (2 * 32 + 3) * 128 * 4 + 8 * 34 * 128 * 2


def test_a_layer_of_dms() -> None:
    """8 heads x 16 blocks of window. Of the 1,000 tokens that left it 1,024 are decided: a head
    keeps 128 entries of them, 8 blocks. Dense: 8 x 79 blocks."""
    layer = 8 * (16 + 8) * BLOCK + STATE
    dense = 8 * 79 * BLOCK
    after = change(DMS(0.125, 256), "decode", 1256, sequences=3)
    assert after.kv_bytes == KV - 3 * 32 * (dense - layer)


def test_dms_lays_out_the_undecided_and_a_span_of_the_prompt() -> None:
    """K and V of the span and of 64 before it, thrice; masks of bools for 8 heads twice and one in
    bf16; scores of 64 entries."""
    laid_out = 3 * (512 + 64) * 2 * 8 * 128 * 2
    masks = 512 * 512 * (2 * 8 + 2)
    scored = (5 * 32 * 64 * 128 + 2 * 512 * 128) * 4
    for new in (512, 4000):
        after = change(DMS(0.125, 256), "prefill", 12560, new=new)
        assert after.activation_bytes == laid_out + masks + scored


def test_a_text_inside_the_window_pays_for_the_flags_and_saves_nothing() -> None:
    """100 tokens in 7 blocks a head, kept whole."""
    after = change(DMS(0.125, 256), "prefill", 100, new=100)
    assert after.kv_bytes == KV + 32 * (STATE - 8 * 668)


def test_a_layer_of_camelot() -> None:
    """512 tokens, 4 first ones and 1,020 slots are 96 blocks a head; beside each slot 12 B and a
    key of 128; two angles for each of 64 planes, and what turns queries to two places."""
    layer = 8 * (96 * BLOCK + 1020 * (12 + 256)) + 5 * 128 * 4
    dense = 8 * 625 * BLOCK
    after = change(CAMELoT(1020, 512), "prefill", 10_000, new=100, sequences=2)
    assert after.kv_bytes == KV - 2 * 32 * (dense - layer)


def test_a_bank_fills_as_tokens_leave_the_exact_ones() -> None:
    """1,300 tokens are in the third segment of 512; of the 1,024 before it 924 are not recent."""
    technique = CAMELoT(4096, 512, recent=100)
    assert technique.held_blocks(LLAMA, 1300) == 32 * 8 * -(-(612 + 4 + 920) // 16)


@pytest.mark.parametrize(
    ("technique", "model", "any_length"),
    [
        (CAMELoT(1024, 512), "llama-3.1-8b", True),
        (CAMELoT(1024, 512), "gemma-2-9b", True),
        (CAMELoT(7676, 512), "smollm2-135m", True),
        (CAMELoT(7677, 512), "smollm2-135m", False),  # further apart than it was trained on
        (CAMELoT(20_000, 4094, positions="constant"), "smollm2-135m", True),
        (CAMELoT(1, 4095, positions="constant"), "smollm2-135m", False),
        (CAMELoT.neutral(), "smollm2-135m", False),
        (DMS(0.125, 256), "smollm2-135m", False),
    ],
)
def test_a_model_reads_any_length_where_nothing_stands_too_far_apart(
    technique: Technique, model: str, any_length: bool
) -> None:
    spec = resolve(model)
    assert (technique.most_tokens(spec) > 4 * 10**6) is any_length
    assert any_length or technique.most_tokens(spec) == spec.max_context_tokens


def test_camelot_lays_out_its_bank_to_write_to_it() -> None:
    """8 heads' K and V in fp32: seven times the slots, six times the tokens, and likenesses."""
    writing = 8 * 4 * (7 * 1020 * 128 + 6 * 512 * 128 + 2 * 512 * 1020)
    after = change(CAMELoT(1020, 512), "decode", 10_000)
    assert after.activation_bytes == writing
    together = change(CAMELoT(1020, 512), "decode", 10_000, sequences=3)
    assert together.activation_bytes == writing + 2 * 2 * 32 * 128 * 4  # two queries of others
    retrieving = change(CAMELoT(1020, 512, top_k=1), "prefill", 10_000, new=4000)
    assert retrieving.activation_bytes > 512 * 32 * 1020 * 4


@pytest.mark.parametrize("technique", [DMS.neutral(), CAMELoT.neutral()])
@pytest.mark.parametrize("phase", PHASES)
def test_the_neutral_setting_changes_no_byte(technique: Technique, phase: PhaseName) -> None:
    assert change(technique, phase, 10_000, new=100) == Footprint(kv_bytes=KV)
    assert technique.unsupported(resolve("mistral-7b-v0.1")) is None


@pytest.mark.parametrize(
    ("model", "works"),
    [("llama-3.1-8b", True), ("gemma-2-9b", True), ("mistral-7b-v0.1", False),
     ("deepseek-v2-lite", False), ("qwen3.5-27b", True)],
)  # fmt: skip
def test_it_takes_a_layer_that_keeps_every_token_head_by_head(model: str, works: bool) -> None:
    for technique in (DMS(0.5), CAMELoT(64)):
        assert (technique.unsupported(resolve(model)) is None) is works


@pytest.mark.parametrize(
    "settings",
    [{"slots": -1}, {"slots": 1.5}, {"slots": True}, {"slots": "many"}, {"segment": 0},
     {"segment": -5}, {"segment": None}, {"threshold": -1.1}, {"threshold": "0.9"},
     {"threshold": float("nan")}, {"top_k": -1}, {"recent": 0.5}, {"positions": "absolute"},
     {"count_bias": 1}, {"count_cap": -1}],
)  # fmt: skip
def test_settings_of_camelot_that_cannot_be(settings: dict[str, Any]) -> None:
    with pytest.raises(TechniqueError, match="camelot: "):
        create(TechniqueChoice("camelot", settings))


def test_what_is_typed_is_of_the_settings_type() -> None:
    assert parse("dms:kept=0.25,window=64") == DMS(0.25, 64)
    assert parse("camelot:segment=128") == CAMELoT(1024, 128)
    with pytest.raises(TechniqueError, match="window is a whole number, not '1e9'"):
        parse("dms:window=1e9")
    for text in (
        "dms:window=6.5",
        "camelot:slots=many",
        "dms:kept",
        "dms:share=1",
        "dms:lag=1,lag=2",
    ):
        with pytest.raises(TechniqueError):
            parse(text)


chosen = st.one_of(
    st.fixed_dictionaries({"kept": st.floats(0.01, 1), "window": st.integers(1, 2000)}).map(
        lambda settings: TechniqueChoice("dms", settings)
    ),
    st.fixed_dictionaries({"slots": st.integers(0, 5000), "segment": st.integers(1, 2000)}).map(
        lambda settings: TechniqueChoice("camelot", settings)
    ),
    st.sampled_from(["none", "int8", "nf4"]).map(
        lambda scheme: TechniqueChoice("quantization", {"scheme": scheme})
    ),
)


@given(
    chosen, st.sampled_from(["smollm2-135m", "llama-3.1-8b", "gemma-2-9b"]),
    st.builds(Workload, st.integers(1, 50_000), st.integers(1, 500), st.integers(1, 9)),
    st.sampled_from(["rtx-4090", "cpu-64gb"]), st.sampled_from(["bf16", "fp32"]),
)  # fmt: skip
def test_its_lines_are_what_it_changes(
    choice: TechniqueChoice, model: str, work: Workload, device: str, dtype: str
) -> None:
    execution = Execution(dtype=dtype, kv_dtype=dtype)
    plain = Recipe(resolve(model), find_device(device), work, execution)
    changed = replace(plain, techniques=(choice,))
    before, after = phase_footprints(plain), phase_footprints(changed)
    for phase in PHASES:
        own = [line for line in explain(changed, phase) if line.what == choice.name]
        assert sum(line.nbytes for line in own) == (
            after[phase].total_bytes - before[phase].total_bytes
        )
        assert all(line.nbytes and line.source.startswith("https://") for line in own)
        assert min(after[phase].kv_bytes, after[phase].weights_bytes) >= 0
    assert before["load"].kv_bytes == after["load"].kv_bytes
