"""Few-shot GLUE: as many solved examples as fit, balanced, in a prompt that is read once and that
questions go on from. Scored as lm-eval does: the likelier of the answers is the model's. The forms
are plainer than lm-eval's, which leave a small model at chance."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from transformers import PreTrainedTokenizerBase

from ullage.errors import InputError
from ullage.measure.quality.prompts import (
    Heard,
    Prompt,
    Question,
    Score,
    averages,
    compare,
    hear,
    question,
)
from ullage.measure.quality.sides import Answer, Side
from ullage.measure.quality.suite import Asked, Found, OnStep
from ullage.measure.quality.tables import Row, Table
from ullage.measure.quality.tokens import beginning, encode
from ullage.specs.evaluation import Comparison

EXAMPLES = 100  # of a task, where --limit does not say
PROMPTS = 2  # of a task: examples are dealt among them, so that no few shots decide alone


@dataclass(frozen=True)
class Form:
    """How a row is asked, and the answer of each label."""

    text: str
    answers: tuple[str, str]

    def asked(self, row: Row) -> str:
        """The question about `row`."""
        return self.text.format(**row.texts)

    def solved(self, row: Row) -> str:
        """The question with its answer."""
        return f"{self.asked(row)} {self.answers[row.label]}\n\n"


_SENTENCES = "Sentence 1: {sentence1}\nSentence 2: {sentence2}\n"
FORMS = {
    "sst2": Form("Review: {sentence}\nSentiment:", ("negative", "positive")),
    "mrpc": Form(f"{_SENTENCES}Same meaning:", ("no", "yes")),
    "rte": Form("Premise: {sentence1}\nHypothesis: {sentence2}\nTrue or false:", ("true", "false")),
    "cola": Form("Sentence: {sentence}\nGrammar:", ("wrong", "right")),
    "qnli": Form("Question: {question}\nText: {sentence}\nAnswered:", ("yes", "no")),
}


@dataclass(frozen=True)
class Examples:
    """One task: its prompts, and the labels behind the questions of each."""

    prompts: list[Prompt]
    labels: list[list[int]]


def prepare(
    tables: dict[str, Table], tokenizer: PreTrainedTokenizerBase, asked: Asked
) -> dict[str, Examples]:
    """The prompts of every task.

    Raises:
        InputError: a table has no rows of a label, or `asked.tokens` have no room for a shot of
            each.
    """
    return {name: _examples(name, table, tokenizer, asked) for name, table in tables.items()}


def measure(
    prepared: dict[str, Examples], sides: tuple[Side, Side], asked: Asked, on_step: OnStep
) -> Found:
    """Each task's accuracy and log-likelihood of the right answer, and both over all tasks."""
    total = sum(len(examples.prompts) for examples in prepared.values())
    done, found = 0, []
    for name, examples in prepared.items():
        heard: list[tuple[Heard, Heard]] = []
        for prompt in examples.prompts:
            on_step(name, done, total)
            heard.append((hear(sides[0], prompt), hear(sides[1], prompt)))
            done += 1
        found.append(_compare(name, examples, heard))
    return Found([*chain(*found), *averages(found)])


def _examples(
    name: str, table: Table, tokenizer: PreTrainedTokenizerBase, asked: Asked
) -> Examples:
    form, draw = FORMS[name], random.Random(f"{name} {asked.seed}")
    if not table.scored or len({row.label for row in table.shots}) < 2:
        raise InputError(f"The data of {name} holds no examples, or shots of one label alone.")
    rows = draw.sample(table.scored, min(asked.limit or EXAMPLES, len(table.scored)))
    dealt = [rows[first::PROMPTS] for first in range(min(PROMPTS, len(rows)))]
    prompts = []
    for some in dealt:
        questions = [_question(form, row, tokenizer) for row in some]
        begun = beginning(tokenizer)
        room = asked.tokens - len(begun) - max(one.tokens for one in questions)
        shots = _shots(form, table.shots, tokenizer, room, draw)
        if not shots:
            raise InputError(
                f"--tokens has no room for two shots of {name} and a question: ask for more."
            )
        prompts.append(Prompt([*begun, *shots], questions))
    return Examples(prompts, [[row.label for row in some] for some in dealt])


def _shots(
    form: Form, rows: list[Row], tokenizer: PreTrainedTokenizerBase, room: int, draw: random.Random
) -> list[int]:
    """Solved examples, one of each label after the other, as many as `room` tokens hold."""
    ids: list[int] = []
    by_label = [[row for row in rows if row.label == label] for label in (0, 1)]
    for pair in zip(*(draw.sample(some, len(some)) for some in by_label), strict=False):
        solved = [encode(tokenizer, form.solved(row)) for row in draw.sample(pair, len(pair))]
        if len(ids) + sum(map(len, solved)) > room:
            break
        ids += chain(*solved)
    return ids


def _question(form: Form, row: Row, tokenizer: PreTrainedTokenizerBase) -> Question:
    return question(tokenizer, form.asked(row), [f" {answer}" for answer in form.answers])


def _compare(
    name: str, examples: Examples, heard: Sequence[tuple[Heard, Heard]]
) -> list[Comparison]:
    labels = list(chain(*examples.labels))
    scores = []
    for side in range(2):
        answers = chain(*(both[side].answers for both in heard))
        scores.append([_score(*one) for one in zip(answers, labels, strict=True)])
    return compare(name, scores, heard)


def _score(answers: list[Answer], label: int) -> Score:
    likely = [answer.log_likelihood for answer in answers]
    return Score(likely.index(max(likely)) == label, likely[label])
