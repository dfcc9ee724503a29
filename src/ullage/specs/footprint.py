"""Footprint: the bytes of one phase, by part; Term: one line of the sum behind it."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Part = Literal["weights", "kv", "activation", "logits", "overhead"]
# How far a figure can be trusted: exact follows from shapes; measured, derived and assumed are
# constants with a source.
Label = Literal["exact", "measured", "derived", "assumed"]


@dataclass(frozen=True)
class Term:
    """One line of a sum: `nbytes` that `what` takes, how sure that is and where it is from."""

    part: Part
    what: str
    nbytes: int
    label: Label = "exact"
    source: str = ""


@dataclass(frozen=True)
class Footprint:
    """Peak bytes of one phase: `activation_bytes` holds scratch too, `overhead_bytes` the runtime
    (interpreter, libraries, device context)."""

    weights_bytes: int = 0
    kv_bytes: int = 0
    activation_bytes: int = 0
    logits_bytes: int = 0
    overhead_bytes: int = 0

    @classmethod
    def of(cls, terms: Iterable[Term]) -> "Footprint":
        """The sum of `terms`, by part."""
        sums = dict.fromkeys(("weights", "kv", "activation", "logits", "overhead"), 0)
        for term in terms:
            sums[term.part] += term.nbytes
        return cls(*sums.values())

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return (
            self.weights_bytes
            + self.kv_bytes
            + self.activation_bytes
            + self.logits_bytes
            + self.overhead_bytes
        )
