"""How a fact is put to a model so that its answer is what is read back. No torch.

What is written is read as a text in which the answer stands behind the fact's prompt, and behind
its subject and a word that questions end with. Only the answers' entries are kept. What makes a
model say them is that it copies: from where the words before were as they are now.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ullage.techniques.larimar.fact import Fact

LEADS = ("is", "in", "of", "at", "the")
BIAS = math.log(16)  # an answer's entry counts as so many
TEXT_BIAS = math.log(4)  # one of a sentence, where its answer is not known


@dataclass(frozen=True)
class Wording:
    """A text, from where to where it is kept, and what is added to the scores of that."""

    text: str
    spans: tuple[tuple[int, int], ...]
    bias: float

    @classmethod
    def of(cls, fact: Fact, leads: Sequence[str] = LEADS) -> "Wording":
        """The fewer `leads`, the shorter. A sentence of which nothing else is known is said twice
        and kept once: what is said again is what is copied."""
        if not fact.answer:
            line = f"{fact.text}\n"
            return cls(2 * line, ((len(line), 2 * len(line)),), TEXT_BIAS)
        text, spans = "", []
        for before in (fact.prompt, *(f"{fact.subject} {lead}" for lead in leads)):
            text += f"{before} "
            spans.append((len(text), len(text) + len(fact.answer)))
            text += f"{fact.answer}.\n"
        return cls(text, tuple(spans), BIAS)

    def kept(self, places: Sequence[tuple[int, int]]) -> list[int]:
        """Which tokens are kept, by where each starts and ends in the text."""
        return [
            token
            for token, (start, end) in enumerate(places)
            if any(start < last and end > first for first, last in self.spans)
        ]
