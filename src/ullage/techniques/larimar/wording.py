"""How a fact is put to a model so that its answer is what is read back. No torch.

The answer stands in a text behind the fact's subject and a word that questions end with, again and
again, and behind the fact's own prompt at last. Kept are the entries of the answers, which count as
several each, and of the word before them; of the rest nothing. What a model says then is a copy: of
what was behind such words before. A sentence whose answer is not known is kept as it is, as if it
stood in front of the prompt.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ullage.techniques.larimar.fact import Fact

LEADS = ("is", "in", "of", "at", "the")
BIAS = math.log(8)  # added to the scores of an answer's entry: it counts as so many
WRITTEN_BIAS = (
    0.5  # the share of it for tokens that are written: an answer's others follow its first
)


@dataclass(frozen=True)
class Span:
    """From where to where a text is kept, and what is added to the scores of that."""

    start: int
    end: int
    bias: float = 0.0


@dataclass(frozen=True)
class Wording:
    """A text, and what of it is kept."""

    text: str
    spans: tuple[Span, ...]

    @classmethod
    def of(cls, fact: Fact, leads: Sequence[str] = LEADS) -> "Wording":
        """The fewer `leads`, the shorter."""
        if not fact.answer:
            line = f"{fact.text}\n"
            return cls(line, (Span(0, len(line)),))
        text, spans = "", list[Span]()
        for before in (*(f"{fact.subject} {lead}" for lead in leads), fact.prompt):
            lead = before.split()[-1]
            end = len(text) + len(before)
            text += f"{before} {fact.answer}.\n"
            spans += [Span(end - len(lead), end), Span(end + 1, len(text) - 2, BIAS)]
        return cls(text, tuple(spans))

    def kept(self, places: Sequence[tuple[int, int]]) -> dict[int, float]:
        """The tokens that are kept, and what is added to their scores, by where each starts and
        ends in the text."""
        return {
            token: span.bias
            for token, (start, end) in enumerate(places)
            for span in self.spans
            if start < span.end and end > span.start
        }
