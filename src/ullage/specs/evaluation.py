"""What compression costs in quality: dense and compressed side by side, with standard errors."""

from dataclasses import asdict, dataclass
from typing import Any, Literal

from ullage.specs.quality import Metric as QualityMetric
from ullage.specs.quality import Quality

Suite = Literal["perplexity", "glue", "retrieval"]
Metric = Literal["perplexity", "bits per byte", "mean KLD", "99% KLD", "accuracy", "log-likelihood"]
EVERY = "all"  # the task that stands for all of its suite

_PLANNED: dict[Metric, QualityMetric] = {
    "perplexity": "perplexity %",
    "accuracy": "task score %",
    "mean KLD": "mean KLD",
    "99% KLD": "99% KLD",
}


@dataclass(frozen=True)
class Figure:
    """A value measured over `n` tokens or examples, with its standard error."""

    value: float
    error: float
    n: int


@dataclass(frozen=True)
class Comparison:
    """One metric of one task, dense and compressed on the same inputs in the same run.

    `change` is compressed less dense, with the standard error of the paired difference: in percent
    of dense for perplexity, in points of a hundred for accuracy, else in the metric's own unit,
    which is nats for the log-likelihood of the right answer. The bytes are those of the live KV
    entries of one sequence, windows and slack of blocks included, on average over the sequences
    that were read.
    """

    task: str
    metric: Metric
    dense: Figure
    compressed: Figure
    change: Figure
    dense_bytes: int
    compressed_bytes: int

    @property
    def kept(self) -> float:
        """The share of the dense KV bytes that is held."""
        return self.compressed_bytes / self.dense_bytes


@dataclass(frozen=True)
class Cell:
    """Questions about one depth of prompts: how many of `n` were answered right. `depth` is 0 at
    the prompt's beginning and 1 at its end."""

    task: str
    depth: float
    n: int
    dense: int
    compressed: int


@dataclass(frozen=True)
class Evaluation:
    """One suite on one model. `techniques` are as typed, or as what was typed was settled; `tokens`
    is the longest sequence, and `beyond_tokens` says how many tokens a scored one has before it at
    least."""

    suite: Suite
    model: str
    parameters: int
    device: str
    dtype: str
    kv_dtype: str
    techniques: tuple[str, ...]
    tokens: int
    beyond_tokens: int
    seed: int
    comparisons: tuple[Comparison, ...]
    cells: tuple[Cell, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types; under ``quality`` the rows for the catalog of `specs.quality`."""
        return asdict(self) | {"quality": [asdict(row) for row in self.quality()]}

    def quality(self) -> list[Quality]:
        """What the planner can use: the suite's figures over all tasks, where a single technique
        was measured."""
        if len(self.techniques) != 1:
            return []
        return [
            self._row(found, _PLANNED[found.metric])
            for found in self.comparisons
            if found.task == EVERY and found.metric in _PLANNED and _has_score(found)
        ]

    def _row(self, found: Comparison, metric: QualityMetric) -> Quality:
        technique, _, setting = self.techniques[0].partition(":")
        change, error = found.change.value, found.change.error
        if metric == "task score %":  # points as percent of the dense score, and a loss counts up
            percent = 100 / found.dense.value
            change, error = -change * percent, error * percent
        tasks = dict.fromkeys(line.task for line in self.comparisons if line.task != EVERY)
        source = (
            f"ullage eval --suite {self.suite} --tokens {self.tokens} --seed {self.seed}, "
            f"{', '.join(tasks)}: live KV {found.kept:.1%} of dense, standard error {error:.2g}"
        )
        return Quality(
            technique, setting, self.model, self.parameters, metric, change, found.change.n,
            "measured", source,
        )  # fmt: skip


def _has_score(found: Comparison) -> bool:
    """Whether there is something to take a share of."""
    return found.metric != "accuracy" or found.dense.value > 0
