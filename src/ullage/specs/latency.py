"""Latency: how long a plan's user waits, with the band that the estimate is good for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Band:
    """The lowest and the highest that is likely."""

    low: float
    high: float


@dataclass(frozen=True)
class Latency:
    """`ttft_s` is the time to the first token of one prompt on an idle engine, in seconds. At the
    planned number of sequences and their full length each then gets `sequence_tokens_per_s`, all
    together `tokens_per_s`."""

    ttft_s: float
    sequence_tokens_per_s: float
    tokens_per_s: float
    ttft_band_s: Band
    tokens_per_s_band: Band
