"""Figures of quality: sourced, and the nearest one first."""

from dataclasses import replace
from typing import get_args, get_type_hints

import pytest

from ullage import resolve
from ullage.specs import quality
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.gguf_mixtures import MIXTURES, TERNARY
from ullage.specs.quality import COMPARABLE, Quality, figures, find, find_tail

OWN, LLAMA, LARGE = resolve("smollm2-135m"), resolve("llama-3.1-8b"), resolve("llama-3.1-70b")


def test_every_figure_says_where_it_is_from() -> None:
    for row in figures():
        assert len(row.source) > 10, row
        assert row.label in get_args(get_type_hints(Quality)["label"])
        assert row.setting == row.setting.lower()
        assert (row.parameters is None) == (row.model == "")
        if row.label == "measured":
            assert row.n, row


def test_the_middle_of_a_band_is_not_what_was_published() -> None:
    for row in figures():
        assert (row.label == "derived") == ("middle of" in row.source), row


def test_a_source_that_was_not_read_is_called_second_hand() -> None:
    assert not [row for row in figures() if "notes on" in row.source]


def test_no_figure_is_there_twice() -> None:
    keys = [(row.technique, row.setting, row.model, row.metric) for row in figures()]
    assert len(keys) == len(set(keys))


@pytest.mark.parametrize(
    ("model", "technique", "setting", "found"),
    [
        (OWN, "weights", "nf4", "smollm2-135m"),  # the same model, our own
        (LLAMA, "weights", "nf4", "llama-7b"),  # about its size
        (resolve("llama-3.2-1b"), "weights", "nf4", "llama-7b"),  # the nearest in size
        (LARGE, "weights", "Q4_K_M", "llama-2-70b"),
        (LLAMA, "weights", "Q4_K_M", "llama-3-8b"),
        (resolve("qwen3-14b"), "dms", "kept=0.5", "qwen3-8b"),
    ],
)
def test_the_nearest_model_goes_first(
    model: object, technique: str, setting: str, found: str
) -> None:
    row = find(model, technique, setting)  # type: ignore[arg-type]
    assert row is not None
    assert row.model == found
    assert row.metric in COMPARABLE


def test_our_own_figure_wins_over_a_published_one(monkeypatch: pytest.MonkeyPatch) -> None:
    published = Quality(
        "weights", "nf4", "llama-3.1-8b", 8 * 10**9, "perplexity %", 5, None, "published", "a page"
    )
    own = replace(published, change=7, label="measured", n=10)
    monkeypatch.setattr(quality, "figures", lambda: (published, own))
    assert find(LLAMA, "weights", "nf4") == own


def test_a_combination_without_a_figure_has_none() -> None:
    assert find(LLAMA, "weights", "int3") is None
    assert find(LLAMA, "kv", "iq4_nl") is None


def test_what_cannot_be_compared_has_no_cost() -> None:
    camelot = find(LLAMA, "camelot", "slots=512")
    assert camelot is not None
    assert camelot.cost_percent is None


def test_the_tail_stands_apart() -> None:
    """What the worst tokens are in for is shown beside the loss, and not added to it."""
    mean, tail = find(LLAMA, "kv", "q8_0"), find_tail(LLAMA, "kv", "Q8_0")
    assert mean is not None
    assert tail is not None
    assert (mean.metric, tail.metric) == ("perplexity %", "99.9% KLD")
    assert tail.cost_percent is None
    assert str(tail) == "99.9% KLD +0.09303 on qwen3.6-27b, published"
    assert find_tail(LLAMA, "kv", "iq4_nl") is None


@pytest.mark.parametrize(
    ("metric", "model", "names"),
    [
        ("perplexity %", "llama-3-8b", "q8_0 q6_k q5_k_m q5_k_s q4_k_m q3_k_m q3_k_s q2_k q2_k_s"),
        ("perplexity %", "llama-3-8b", "iq4_xs iq3_m iq3_xxs iq2_m iq2_xs iq2_xxs iq1_m iq1_s"),
        ("perplexity %", "llama-2-70b", "q6_k q5_k_m q4_k_m q3_k_l q3_k_m q3_k_s q2_k"),
        ("99% KLD", "mistral-7b", "q3_k_s q2_k q2_k_s iq2_xxs iq1_s"),
    ],
)
def test_a_narrower_format_loses_more(metric: str, model: str, names: str) -> None:
    rows = {row.setting: row.change for row in figures() if (row.metric, row.model) ==
            (metric, model)}  # fmt: skip
    losses = [rows[name] for name in names.split()]
    assert losses == sorted(losses)


def test_every_gguf_type_of_a_search_has_a_figure() -> None:
    for name in MIXTURES:
        if name not in (*TERNARY, *DTYPE_BYTES, "mxfp4"):
            row = find(LLAMA, "weights", name)
            assert row is not None, name
            assert row.metric in COMPARABLE


def test_a_gain_is_noise_and_costs_nothing() -> None:
    row = find(resolve("llama-2-13b"), "weights", "nf4")
    assert row is not None
    assert row.change < 0 == row.cost_percent
    assert str(row) == "task score +0.41% on llama-13b, published"
