"""Means, percentiles, and their standard errors."""

from math import log

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.measure.quality import figures

SAMPLES = st.lists(st.floats(0.1, 8), min_size=2, max_size=50).map(np.array)


@given(SAMPLES)
def test_perplexity_and_its_change_agree(losses: np.ndarray) -> None:
    worse = losses + 0.1
    change = figures.perplexity_change(losses, worse)
    ratio = figures.perplexity(worse).value / figures.perplexity(losses).value
    assert change.value == pytest.approx(100 * (ratio - 1))
    assert change.error == pytest.approx(0, abs=1e-6)  # the same for each token: no noise is left
    assert change.n == len(losses)


@given(SAMPLES, st.integers(1, 500))
def test_bits_are_spread_over_the_bytes(losses: np.ndarray, text_bytes: int) -> None:
    bits = figures.bits_per_byte(losses, text_bytes)
    assert bits.value == pytest.approx(losses.sum() / log(2) / text_bytes)


def test_the_percentiles_error_is_about_what_samples_spread() -> None:
    draw = np.random.default_rng(0)
    samples = [figures.percentile(draw.exponential(size=2000)) for _ in range(200)]
    spread = np.std([sample.value for sample in samples])
    assert np.mean([sample.error for sample in samples]) == pytest.approx(spread, rel=0.3)
    assert np.mean([sample.value for sample in samples]) == pytest.approx(log(100), rel=0.05)


def test_one_value_has_no_error() -> None:
    assert figures.mean(np.array([3.0])) == figures.Figure(3.0, 0.0, 1)
