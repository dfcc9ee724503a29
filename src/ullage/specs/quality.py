"""What a choice costs in quality: published and own figures, from catalog/quality.json."""

import json
from dataclasses import dataclass
from functools import cache
from math import inf, log2
from pathlib import Path
from typing import Literal

from ullage.specs.model import ModelSpec

Metric = Literal[
    "perplexity %",
    "task score %",
    "mean KLD",
    "99% KLD",
    "99.9% KLD",
    "text similarity %",
    "perplexity % against the window alone",
]
# What can be compared and, roughly, added: the share of a figure that is lost against the same
# model without the choice.
COMPARABLE: tuple[Metric, ...] = ("perplexity %", "task score %")
# What the worst tokens are in for, which a mean hides: the divergence that so many stay below.
TAIL: tuple[Metric, ...] = ("99% KLD", "99.9% KLD")
_SAME_SIZE = 1.0  # a model of half to twice the size


@dataclass(frozen=True)
class Quality:
    """One figure. `change` is how much worse, in `metric`: percent more perplexity, percent less
    score; below zero is better.

    `technique` is "weights" or "kv", whose `setting` is a format, or a technique's folder, whose
    `setting` is as typed (``kept=0.125``). `parameters` is the size of `model`; both are empty
    where the source does not say. `n` counts what was measured over, as `source` explains.
    `label` is "measured" where the figure is our own, "derived" where it is the middle of a
    published band.
    """

    technique: str
    setting: str
    model: str
    parameters: int | None
    metric: Metric
    change: float
    n: int | None
    label: Literal["measured", "published", "derived"]
    source: str

    @property
    def cost_percent(self) -> float | None:
        """The loss in percent, for ranking: none where the figure is better than without, which is
        noise; None where the metric cannot be compared."""
        return max(0.0, self.change) if self.metric in COMPARABLE else None

    def __str__(self) -> str:
        unit = self.metric.replace(" %", "")
        percent = "%" if " %" in self.metric else ""
        sign = -1 if self.metric in ("task score %", "text similarity %") else 1
        where = f" on {self.model}" if self.model else ""
        return f"{unit} {sign * self.change + 0.0:+.4g}{percent}{where}, {self.label}"


@cache
def figures() -> tuple[Quality, ...]:
    """All figures."""
    text = (Path(__file__).parent / "catalog" / "quality.json").read_text("utf-8")
    return tuple(Quality(**row) for row in json.loads(text))


def find(model: ModelSpec, technique: str, setting: str) -> Quality | None:
    """The figure nearest to `setting` of `technique` on `model`, None where there is none; those of
    the tail apart.

    One that can be compared goes before one that cannot; of those the same model before one of
    about its size, before the nearest in size; and there our own before a published one.
    """
    return _nearest(model, technique, setting, tail=False)


def find_tail(model: ModelSpec, technique: str, setting: str) -> Quality | None:
    """The figure of the tail nearest to `setting` of `technique` on `model`, None where there is
    none."""
    return _nearest(model, technique, setting, tail=True)


def _nearest(model: ModelSpec, technique: str, setting: str, tail: bool) -> Quality | None:
    parameters, wanted = model.parameters, (technique, setting.lower(), tail)
    found = [row for row in figures() if (row.technique, row.setting, row.metric in TAIL) == wanted]
    return min(found, key=lambda row: _distance(row, model.name, parameters), default=None)


def _distance(row: Quality, name: str, parameters: int) -> tuple[bool, float, bool, float]:
    apart = inf if row.parameters is None else abs(log2(row.parameters / parameters))
    if row.model == name:
        group = -1.0
    elif apart <= _SAME_SIZE:
        group = 0.0
    else:
        group = apart
    return row.metric not in COMPARABLE, group, row.label != "measured", apart
