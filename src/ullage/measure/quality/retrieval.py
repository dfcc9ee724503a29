"""Retrieval as RULER asks for it (arXiv 2404.06654): what was said once in a prompt of essays.

needle: a number with a name. key-value: a word for a word, on a line of its own. variables: a
number has a name, and further on that has another name; the number is asked by the other name, in
two steps that must both be right. One of each is said at every depth of one prompt. A question is a
sentence to go on with, which small models that answer no questions can do, too. A prompt is read
before anything is asked, and once for all its questions.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from ullage.errors import InputError
from ullage.measure.quality.prompts import (
    Heard,
    Prompt,
    Score,
    averages,
    compare,
    hear,
    question,
)
from ullage.measure.quality.sides import Answer, Side
from ullage.measure.quality.suite import Asked, Found, OnStep
from ullage.measure.quality.tokens import beginning, encode
from ullage.specs.evaluation import Cell, Comparison

QUESTIONS = 40  # of a form, where --limit does not say
DEPTHS = tuple((2 * eighth + 1) / 16 for eighth in range(8))
FORMS = {"needle": 1, "key-value": 1, "variables": 2}  # and the steps of a question
_WORDS = 5  # that what is said at a depth takes
_STEP = 1 / len(DEPTHS)  # from one depth to the next
_LEAST_SENTENCES = 4 * len(DEPTHS)  # so that facts stand apart
_SENTENCE = re.compile(r"(?<=[.!?])\s+")
_WORD = re.compile(r"\b[a-z]{4,9}\b")


@dataclass(frozen=True)
class Fact:
    """Sentences, `said` one after the other around a depth; at the prompt's end the first text of
    each of `steps` is to be followed by the second."""

    said: tuple[str, ...]
    steps: tuple[tuple[str, str], ...]


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


def prepare(essays: str, tokenizer: PreTrainedTokenizerBase, asked: Asked) -> list[Prompt]:
    """Prompts with their questions: form by form, each depth after depth.

    Raises:
        InputError: `asked.tokens` have no room for the facts, or essays are too short.
    """
    haystack, draw = Haystack(essays, tokenizer), random.Random(asked.seed)
    count = -(-(asked.limit or QUESTIONS) // len(DEPTHS))
    return [_prompt(haystack, asked.tokens, draw) for _ in range(count)]


def measure(
    prepared: list[Prompt], sides: tuple[Side, Side], asked: Asked, on_step: OnStep
) -> Found:
    """Right answers of each form, of all, and of each depth."""
    heard: list[tuple[Heard, Heard]] = []
    for prompt in prepared:
        on_step(f"{asked.tokens:,} tokens", len(heard), len(prepared))
        heard.append((hear(sides[0], prompt), hear(sides[1], prompt)))
    scores = [[_scores(both[side]) for both in heard] for side in range(2)]
    found: list[list[Comparison]] = []
    cells: list[Cell] = []
    for form in FORMS:
        dense, compressed = ([by_form[form] for by_form in side] for side in scores)
        found.append(compare(form, [list(chain(*dense)), list(chain(*compressed))], heard))
        cells += _cells(form, dense, compressed)
    return Found([*chain(*found), *averages(found)], cells)


def _scores(heard: Heard) -> dict[str, list[Score]]:
    """By form, depth after depth."""
    answers = (answers[0] for answers in heard.answers)
    return {
        form: [_score([next(answers) for _ in range(steps)]) for _ in DEPTHS]
        for form, steps in FORMS.items()
    }


def _score(steps: Sequence[Answer]) -> Score:
    return Score(all(step.greedy for step in steps), sum(step.log_likelihood for step in steps))


def _cells(
    form: str, dense: Sequence[Sequence[Score]], compressed: Sequence[Sequence[Score]]
) -> Iterator[Cell]:
    right = ([sum(score.right for score in at) for at in zip(*side, strict=True)]
             for side in (dense, compressed))  # fmt: skip
    for depth, *two in zip(DEPTHS, *right, strict=True):
        yield Cell(form, depth, len(dense), *two)


def _prompt(haystack: Haystack, tokens: int, draw: random.Random) -> Prompt:
    """As many sentences as there is room for, and facts among them."""
    tokenizer = haystack.tokenizer
    words = haystack.draw_words(_WORDS * len(DEPTHS), draw)
    facts = [_facts(words[at :: len(DEPTHS)], draw) for at in range(len(DEPTHS))]  # by depth
    questions = [
        question(tokenizer, asked, [given])
        for same_form in zip(*facts, strict=True)
        for fact in same_form
        for asked, given in fact.steps
    ]
    said = [
        [encode(tokenizer, sentence) for fact in several for sentence in fact.said]
        for several in facts
    ]
    begun = beginning(tokenizer)
    taken = len(begun) + sum(map(len, chain(*said))) + max(one.tokens for one in questions)
    start = draw.randrange(len(haystack.sentences))
    parts = haystack.fill(start, tokens - taken)
    if len(parts) < _LEAST_SENTENCES:
        raise InputError(f"--tokens {tokens:,} has no room for what is asked: ask for more.")
    return Prompt([*begun, *chain(*_among(parts, said))], questions)


def _facts(words: Sequence[str], draw: random.Random) -> tuple[Fact, Fact, Fact]:
    """One of each form."""
    name, key, value, first, other = words
    return (
        _needle(f"The magic number of {name} is", f" {_number(draw)}"),
        Fact((f"\n{key}: {value}\n",), ((f"\n{key}:", f" {value}"),)),
        _variable(first, f"The other name of {other} is", f" {_number(draw)}"),
    )


def _needle(asked: str, number: str) -> Fact:
    return Fact((f" {asked}{number}.",), ((f"\n\n{asked}", number),))


def _variable(name: str, asked: str, number: str) -> Fact:
    first = f"The magic number of {name} is"
    said = (f" {first}{number}.", f" {asked} {name}.")
    return Fact(said, ((f"\n\n{asked}", f" {name}"), (f"\n\n{asked} {name}. {first}", number)))


def _number(draw: random.Random) -> int:
    return draw.randrange(10_000, 100_000)


def _among(parts: list[list[int]], said: Sequence[Sequence[list[int]]]) -> list[list[int]]:
    """`parts` with what is said at each depth, spread evenly around it."""
    places = [
        (round((depth + _STEP * ((at + 0.5) / len(sentences) - 0.5)) * len(parts)), ids)
        for depth, sentences in zip(DEPTHS, said, strict=True)
        for at, ids in enumerate(sentences)
    ]
    every = list(parts)
    for place, ids in reversed(places):  # from the end, so that places stay what they are
        every.insert(place, ids)
    return every
