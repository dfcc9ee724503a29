"""Which fact a prompt is about, if any, by its letters alone. It never sees what a model
answers, nor the answer of a fact that has a prompt; a sentence without one counts as it is.

The paper's own gate compares sentences, answers among them, by an encoder of its own. Here a fact
is in scope where its subject stands near the prompt's end: what a long text named in passing is not
what it asks about. Nothing is trained, so whatever is asked of a subject is taken for what is known
of it.
"""

import math
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.subject import WORD, folded, names

# Before a name they are no part of it: "President Obama" is Obama, "New York" is not York.
_TITLES = (
    "mr mrs ms miss dr prof professor sir dame lord lady president minister chancellor senator "
    "king queen prince princess emperor pope captain general"
)
_TITLE_WORDS = frozenset(_TITLES.split())

NEAR_WORDS = 32  # at most behind a subject; a chat template's own are a few of them
_MARKS = ("#", "+")  # behind a name they make it another: C, C#, C++


@dataclass(frozen=True)
class _Place:
    """Where a subject, folded, stands in a text, from `start` to `end`."""

    start: int
    end: int
    subject: str


class Gate:
    """The subjects of facts. To write and to forget take as long whatever is held, and a prompt is
    gone through once."""

    def __init__(self, facts: Mapping[int, Fact] | None = None) -> None:
        self._facts: dict[int, Fact] = {}
        self._numbers: dict[str, list[int]] = {}  # by subject, folded
        self._subjects: dict[str, set[str]] = {}  # by their first word
        self._held: Counter[str] = Counter()  # facts that ask with a word
        for number, fact in (facts or {}).items():
            self.write(number, fact)

    def write(self, number: int, fact: Fact) -> None:
        """Take a fact in, or another in the place of that number."""
        if number in self._facts:
            self.forget(number)
        subject = folded(fact.subject)
        self._facts[number] = fact
        self._numbers.setdefault(subject, []).append(number)
        self._subjects.setdefault(_words(subject)[0], set()).add(subject)
        self._held.update(_asked(fact))

    def forget(self, number: int) -> None:
        """Let go of a fact that is held."""
        fact = self._facts.pop(number)
        subject = folded(fact.subject)
        self._numbers[subject].remove(number)
        if not self._numbers[subject]:
            del self._numbers[subject]
            first = _words(subject)[0]
            self._subjects[first].remove(subject)
            if not self._subjects[first]:
                del self._subjects[first]
        for word in _asked(fact):
            self._held[word] -= 1
            if not self._held[word]:
                del self._held[word]

    def scope(self, prompt: str) -> int | None:
        """The number of the fact that `prompt` is about; None if it is about none that is held.

        Of several subjects the one of the rarest words counts, then the last; of several facts
        about it the one whose prompt is likest, then the longest, then the newest.
        """
        text = unicodedata.normalize("NFKC", prompt)
        places = list(self._places(text))
        if not places:
            return None
        chosen = max(
            places, key=lambda place: (self._weight(set(_words(place.subject))), place.end)
        )
        asked = set(_words(text))
        return max(self._numbers[chosen.subject], key=lambda number: self._likeness(number, asked))

    def _places(self, text: str) -> Iterator[_Place]:
        found = list(WORD.finditer(text))
        cased = text not in (text.lower(), text.upper())  # or capitals tell nothing
        named = list(names(text)) if cased else []
        for at, word in enumerate(found):
            for subject in self._subjects.get(word[0].casefold(), ()):
                if self._is_far(subject, len(found) - at - len(WORD.findall(subject))):
                    continue
                place = _place(text, found[at : at + len(subject)], subject)
                if place is None:
                    continue
                if cased and (not self._has_capitals(place, text) or _in_name(place, text, named)):
                    continue
                yield place

    def _is_far(self, subject: str, behind: int) -> bool:
        """Whether so many words `behind` it say that it is not what is asked about: more than there
        are in any fact about it."""
        own = (self._facts[number] for number in self._numbers[subject])
        longest = (len(WORD.findall(fact.prompt or fact.text)) for fact in own)
        return behind > NEAR_WORDS and behind > max(longest)

    def _has_capitals(self, place: _Place, text: str) -> bool:
        """Whether it has those of its subject, or more: "life" is no "Life"."""
        own = self._facts[self._numbers[place.subject][0]].subject
        pairs = zip(WORD.findall(text[place.start : place.end]), WORD.findall(own), strict=False)
        return all(there[0].isupper() or not word[0].isupper() for there, word in pairs)

    def _likeness(self, number: int, asked: set[str]) -> tuple[float, float, int]:
        """The share of a fact's words, by their weight, that are asked for; where a prompt has all
        words of several, how much they weigh; then the newest."""
        own = _asked(self._facts[number])
        common = self._weight(own & asked)
        return common / self._weight(own), common, number

    def _weight(self, words: set[str]) -> float:
        """The rarer words are, the more they weigh; the same in whatever order a set has them."""
        return math.fsum(math.log(1 + len(self._facts) / max(1, self._held[w])) for w in words)


def _words(text: str) -> tuple[str, ...]:
    plain = unicodedata.normalize("NFKC", text)
    return tuple(word.casefold() for word in WORD.findall(plain))


def _asked(fact: Fact) -> set[str]:
    """The words that its answer follows; all of a fact whose answer is not known."""
    return set(_words(fact.prompt or fact.text))


def _place(text: str, words: list[re.Match[str]], subject: str) -> _Place | None:
    """Where `subject` stands in `text`, from the first of `words` on; None if it does not."""
    own = list(WORD.finditer(subject))
    if len(words) < len(own):
        return None
    start = words[0].start() - own[0].start()  # with its own marks around it
    end = words[len(own) - 1].end() + len(subject) - own[-1].end()
    if start < 0 or folded(text[start:end]) != subject or text[end : end + 1] in _MARKS:
        return None
    return _Place(start, end, subject)


def _in_name(place: _Place, text: str, named: list[tuple[int, int]]) -> bool:
    """Whether it is a part of a longer name, but for a title or initials before it."""
    for start, end in named:
        if start <= place.start and place.end <= end:
            before = WORD.findall(text[start : place.start].casefold())
            longer = any(len(word) > 1 and word not in _TITLE_WORDS for word in before)
            return longer or bool(WORD.search(text[place.end : end]))
    return False
