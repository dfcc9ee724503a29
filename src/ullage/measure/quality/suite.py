"""What every suite is asked, and what it finds. No torch."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ullage.measure.quality.tables import read_glue
from ullage.measure.quality.texts import read_essays, read_texts
from ullage.specs.evaluation import Cell, Comparison, Suite

OnStep = Callable[[str, int, int], None]  # what is read, steps done, steps in all


@dataclass(frozen=True)
class Asked:
    """`tokens` is the length of the longest sequence; `limit` counts what one task takes, None: as
    many as the suite thinks right. The same `seed` draws the same inputs."""

    tokens: int
    beyond_tokens: int
    limit: int | None
    seed: int


@dataclass(frozen=True)
class Found:
    """The figures of a suite, and for those that ask about places in a prompt, place by place."""

    comparisons: list[Comparison]
    cells: list[Cell] = field(default_factory=list)


# What a suite takes of a folder of data.
READERS: dict[Suite, Callable[[Path], Any]] = {
    "perplexity": read_texts,
    "glue": read_glue,
    "retrieval": read_essays,
}
