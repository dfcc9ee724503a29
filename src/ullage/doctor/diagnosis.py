"""Diagnosis: what a log says has happened to the memory. Data only."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ullage.doctor.log import Found
from ullage.specs.footprint import Part, Term

Phase = Literal["load", "profile", "prefill", "decode", "serve"]
Culprit = Literal[
    "weights", "kv", "activation", "logits", "graphs", "fragmentation", "other process",
    "host memory",
]  # fmt: skip
_LONGEST_EVIDENCE = 240  # characters of a line that are worth showing


@dataclass(frozen=True)
class Evidence:
    """A line of the log: its number, from 1, and its text."""

    line: int
    text: str


@dataclass(frozen=True)
class Change:
    """What to change: `flags` as they are typed, and the bytes that it frees where the log's
    figures tell."""

    flags: str
    why: str
    frees_bytes: int | None = None


@dataclass(frozen=True)
class Run:
    """What a log says of how an engine was started; None where it says nothing."""

    model: str = ""
    dtype: str = ""
    kv_dtype: str = ""
    quantization: str = ""
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    prefill_chunk: int | None = None
    utilization: float | None = None
    tensor_parallel: int = 1
    pipeline_parallel: int = 1


@dataclass(frozen=True)
class Diagnosis:
    """What has happened, in figures that stand in the log.

    `parts` are what the log measured, labelled so, with the line as their source. `wanted_bytes` is
    the request that failed and `free_bytes` what there was. `fragmentation` and `cold_start_spike`
    are None where the log does not tell. `device` is the catalog's name of the
    card, "" where the log names none. `changes` stand in the order of what they cost.
    """

    happened: str
    failed: bool
    engine: str = ""
    engine_version: str = ""
    phase: Phase | None = None
    culprit: Culprit | None = None
    parts: tuple[Term, ...] = ()
    wanted_bytes: int | None = None
    free_bytes: int | None = None
    total_bytes: int | None = None
    device: str = ""
    fragmentation: bool | None = None
    cold_start_spike: bool | None = None
    causes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    evidence: tuple[Evidence, ...] = ()
    run: Run = field(default_factory=Run)
    planned: str = ""

    def to_json(self) -> dict[str, Any]:
        """A dict of JSON types."""
        return asdict(self)


def measured(part: Part, what: str, nbytes: int, found: Found) -> Term:
    """A part that the log measured."""
    return Term(part, what, nbytes, "measured", f"line {found.line.number} of the log")


def evidence(*places: Found | None) -> tuple[Evidence, ...]:
    """The lines of what was found, in the log's order, each once."""
    lines = {found.line.number: found.line.text for found in places if found is not None}
    return tuple(Evidence(number, _shown(lines[number])) for number in sorted(lines))


def _shown(text: str) -> str:
    """A long line up to a blank, where it has one, so that no figure is cut into another."""
    if len(text) <= _LONGEST_EVIDENCE:
        return text
    cut = text[: _LONGEST_EVIDENCE - len(" …")]
    whole = cut if text[len(cut)] == " " else cut.rpartition(" ")[0] or cut
    return f"{whole} …"
