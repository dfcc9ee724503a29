"""Means, percentiles and their standard errors; differences are paired, input by input."""

from collections.abc import Sequence
from math import log

import numpy as np
from numpy.typing import NDArray

from ullage.specs.evaluation import Figure

Values = NDArray[np.float64]  # [n], one a token or an example

POINTS = 100.0  # a score of 1 is a hundred points
_PERCENTILE = 0.99


def mean(values: Values, unit: float = 1.0) -> Figure:
    """The mean of `values`, times `unit`."""
    n = len(values)
    error = float(values.std(ddof=1)) / n**0.5 if n > 1 else 0.0
    return Figure(unit * float(values.mean()), unit * error, n)


def perplexity(losses: Values) -> Figure:
    """The perplexity behind losses in nats; its error is that of the mean loss, carried on."""
    loss = mean(losses)
    value = float(np.exp(loss.value))
    return Figure(value, value * loss.error, loss.n)


def perplexity_change(dense: Values, compressed: Values) -> Figure:
    """How much larger the perplexity is, in percent of dense."""
    difference = mean(compressed - dense)
    ratio = float(np.exp(difference.value))
    return Figure(100 * (ratio - 1), 100 * ratio * difference.error, difference.n)


def bits_per_byte(losses: Values, text_bytes: int) -> Figure:
    """Losses in nats, or differences of losses, as bits for each byte of the text."""
    return mean(losses, len(losses) / (log(2) * text_bytes))


def percentile(values: Values) -> Figure:
    """The 99th percentile. Its error is half the way between the order statistics that stand one
    standard deviation of the count below it apart on either side."""
    n = len(values)
    aside = (_PERCENTILE * (1 - _PERCENTILE) / n) ** 0.5
    low, value, high = np.quantile(
        values, [_PERCENTILE - aside, _PERCENTILE, min(1.0, _PERCENTILE + aside)]
    )
    return Figure(float(value), float(high - low) / 2, n)


def average(several: Sequence[Figure]) -> Figure:
    """The mean of independent figures, each weighing the same; `n` counts all that they counted."""
    count = len(several)
    error = sum(figure.error**2 for figure in several) ** 0.5 / count
    value = sum(figure.value for figure in several) / count
    return Figure(value, error, sum(figure.n for figure in several))
