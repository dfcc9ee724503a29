"""Retrieval as RULER asks for it (arXiv 2404.06654): what was said once in a long prompt.

needle: sentences with a number each, at several depths of essays. key-value: a prompt of nothing
but such pairs. variables: a number has a name, and further on that has another name; the number is
asked by the other name, in two steps that must both be right. A question is a sentence to go on
with, which small models that answer no questions can do, too. Prompts are read before anything is
asked, and each is asked about every depth.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from ullage.errors import InputError
from ullage.measure.quality.prompts import (
    Heard,
    Prompt,
    accuracy,
    average,
    beginning,
    encode,
    hear,
    question,
)
from ullage.measure.quality.sides import Side
from ullage.measure.quality.suite import Asked, Found, OnStep
from ullage.specs.evaluation import Cell, Comparison

QUESTIONS = 20  # of a form and length, where --limit does not say
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_STEP = 0.2  # from one depth to the next
_LEAST_SENTENCES = 2 * len(DEPTHS)  # so that facts stand apart
_SEAM_TOKENS = 4  # that words may take more where they meet others
_HALVINGS = 2  # lengths are that of --tokens, half of it, and a quarter, down to:
_SHORTEST_TOKENS = 512
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\b[a-z]{4,9}\b")


@dataclass(frozen=True)
class Fact:
    """Sentences, `said` one after the other from one depth up to the next; at the prompt's end the
    first text of each of `steps` is to be followed by the second."""

    said: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Asking:
    """Prompts of one form and length, which ask about one depth after the other."""

    form: str
    tokens: int
    prompts: list[Prompt]


class Haystack:
    """Essays as sentences with their tokens, and the words that they are made of."""

    def __init__(self, text: str, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self.words = sorted(set(_WORD.findall(text)))
        self.sentences = [f" {sentence}" for sentence in _SENTENCE.split(text) if sentence]

    def draw_words(self, count: int, draw: random.Random) -> list[str]:
        """`count` words, none twice.

        Raises:
            InputError: there are fewer.
        """
        if len(self.words) < count:
            raise InputError(f"The essays have {len(self.words)} words: {count} are needed.")
        return draw.sample(self.words, count)

    def fill(self, start: int, tokens: int) -> list[list[int]]:
        """Sentences from `start` on, around the end, as many as `tokens` hold.

        Raises:
            InputError: there are fewer.
        """
        taken: list[list[int]] = []
        for at in range(start, start + len(self.sentences)):
            ids = encode(self.tokenizer, self.sentences[at % len(self.sentences)])
            tokens -= len(ids)
            if tokens < 0:
                return taken
            taken.append(ids)
        raise InputError(f"The essays are {tokens:,} tokens too short for prompts of that length.")


def prepare(essays: str, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[Asking]:
    """Prompts of every form and length.

    Raises:
        InputError: a length that has no room for the questions, or essays of too few words.
    """
    haystack = Haystack(essays, tokenizer)
    shorter = [asked.tokens >> halving for halving in range(_HALVINGS, 0, -1)]
    lengths = [*(tokens for tokens in shorter if tokens >= _SHORTEST_TOKENS), asked.tokens]
    count = -(-(asked.limit or QUESTIONS) // len(DEPTHS))
    askings = []
    for form, make in _FORMS.items():
        for tokens in lengths:
            draw = random.Random(f"{form} {tokens} {asked.seed}")
            prompts = [make(haystack, tokens, draw) for _ in range(count)]
            askings.append(Asking(form, tokens, prompts))
    return askings


def measure(
    prepared: list[Asking], sides: tuple[Side, Side], asked: Asked, on_step: OnStep
) -> Found:
    """Right answers of each form and length, of all, and of each depth."""
    total = sum(len(asking.prompts) for asking in prepared)
    done = 0
    comparisons: list[Comparison] = []
    cells: list[Cell] = []
    for asking in prepared:
        heard: list[tuple[Heard, Heard]] = []
        for prompt in asking.prompts:
            on_step(f"{asking.form}, {asking.tokens:,} tokens", done, total)
            heard.append((hear(sides[0], prompt), hear(sides[1], prompt)))
            done += 1
        right = [[_right(both[side]) for both in heard] for side in range(2)]
        live_bytes = [[both[side].live_bytes for both in heard] for side in range(2)]
        every = [list(chain(*side)) for side in right]
        comparisons.append(accuracy(f"{asking.form} {asking.tokens:,}", every, live_bytes))
        cells += _cells(asking, right)
    return Found([*comparisons, average(comparisons)], cells)


def _right(heard: Heard) -> list[bool]:
    """Whether all steps are right, for each depth."""
    steps = [answers[0].greedy for answers in heard.answers]
    count = len(steps) // len(DEPTHS)
    return [all(steps[at : at + count]) for at in range(0, len(steps), count)]


def _cells(asking: Asking, right: list[list[list[bool]]]) -> Iterator[Cell]:
    by_depth = (zip(*side, strict=True) for side in right)
    for depth, dense, compressed in zip(DEPTHS, *by_depth, strict=True):
        yield Cell(asking.form, asking.tokens, depth, len(dense), sum(dense), sum(compressed))


def _needle(haystack: Haystack, tokens: int, draw: random.Random) -> Prompt:
    facts = []
    for word in haystack.draw_words(len(DEPTHS), draw):
        asked, number = f"The magic number of {word} is", f" {_number(draw)}"
        facts.append(Fact((f" {asked}{number}.",), ((f"\n\n{asked}", number),)))
    return _among_essays(haystack, facts, tokens, draw)


def _variables(haystack: Haystack, tokens: int, draw: random.Random) -> Prompt:
    facts = []
    words = iter(haystack.draw_words(2 * len(DEPTHS), draw))
    for name, other in zip(words, words, strict=True):
        first, number = f"The magic number of {name} is", f" {_number(draw)}"
        second = f"The other name of {other} is"
        said = (f" {first}{number}.", f" {second} {name}.")
        steps = ((f"\n\n{second}", f" {name}"), (f"\n\n{second} {name}. {first}", number))
        facts.append(Fact(said, steps))
    return _among_essays(haystack, facts, tokens, draw)


def _key_value(haystack: Haystack, tokens: int, draw: random.Random) -> Prompt:
    """Nothing but pairs; those at the depths are asked about."""
    tokenizer = haystack.tokenizer
    facts: list[Fact] = []
    lines: list[list[int]] = []
    room = tokens - len(beginning(tokenizer)) - _SEAM_TOKENS
    for word in haystack.draw_words(len(haystack.words), draw):
        number = f" {_number(draw)}"
        ids = encode(tokenizer, f"{word}:{number}\n")
        room -= len(ids)
        if room < max(map(len, [*lines, ids])):  # a question is as long as a line
            break
        lines.append(ids)
        facts.append(Fact((), ((f"{word}:", number),)))
    else:
        raise InputError(f"The essays have {len(lines):,} words: too few for {tokens:,} tokens.")
    if len(facts) < len(DEPTHS):
        raise _no_room(tokens)
    asked = [facts[int(depth * len(facts))] for depth in DEPTHS]
    return _prompt(tokenizer, lines, asked)


def _among_essays(
    haystack: Haystack, facts: Sequence[Fact], tokens: int, draw: random.Random
) -> Prompt:
    """A fact at each of the depths of as many sentences as there is room for."""
    tokenizer = haystack.tokenizer
    said = [[encode(tokenizer, sentence) for sentence in fact.said] for fact in facts]
    asked = [encode(tokenizer, "".join(step)) for fact in facts for step in fact.steps]
    taken = len(beginning(tokenizer)) + sum(map(len, chain(*said))) + max(map(len, asked))
    start = draw.randrange(len(haystack.sentences))
    parts = haystack.fill(start, tokens - taken - _SEAM_TOKENS)
    if len(parts) < _LEAST_SENTENCES:
        raise _no_room(tokens)
    places = [
        (round((depth + _STEP * at / len(sentences)) * len(parts)), ids)
        for depth, sentences in zip(DEPTHS, said, strict=True)
        for at, ids in enumerate(sentences)
    ]
    for place, ids in reversed(places):  # from the end, so that places stay what they are
        parts.insert(place, ids)
    return _prompt(tokenizer, parts, facts)


def _prompt(
    tokenizer: PreTrainedTokenizerBase, parts: Sequence[list[int]], facts: Sequence[Fact]
) -> Prompt:
    questions = [
        question(tokenizer, asked, [given]) for fact in facts for asked, given in fact.steps
    ]
    return Prompt([*beginning(tokenizer), *chain(*parts)], questions)


def _number(draw: random.Random) -> int:
    return draw.randrange(10_000, 100_000)


def _no_room(tokens: int) -> InputError:
    return InputError(f"{tokens:,} tokens have no room for {len(DEPTHS)} facts: ask for more.")


_FORMS: dict[str, Callable[[Haystack, int, random.Random], Prompt]] = {
    "needle": _needle,
    "key-value": _key_value,
    "variables": _variables,
}
