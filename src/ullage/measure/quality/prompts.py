"""Long prompts that are read once, and the questions that go on from each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ullage.measure.quality import figures
from ullage.measure.quality.figures import POINTS, Values
from ullage.measure.quality.sides import Answer, Side
from ullage.measure.quality.tokens import encode
from ullage.specs.evaluation import EVERY, Comparison, Metric


@dataclass(frozen=True)
class Question:
    """Tokens that ask, and those of each answer that is weighed."""

    asked: list[int]
    choices: list[list[int]]

    @property
    def tokens(self) -> int:
        """With the longest answer."""
        return len(self.asked) + max(map(len, self.choices))


@dataclass(frozen=True)
class Prompt:
    """Tokens that are read once, and the questions about them."""

    ids: list[int]
    questions: list[Question]

    @property
    def tokens(self) -> int:
        """With the longest question."""
        return len(self.ids) + max(question.tokens for question in self.questions)


@dataclass(frozen=True)
class Heard:
    """What one side answered: the answers of each question, and the live bytes of the prompt."""

    answers: list[list[Answer]]
    live_bytes: int


@dataclass(frozen=True)
class Score:
    """One question: whether it was answered right, and the log-likelihood of the right answer, in
    nats."""

    right: bool
    log_likelihood: float


def hear(side: Side, prompt: Prompt) -> Heard:
    """Read `prompt` and go on from it with each question."""
    with side.open(prompt.tokens, prompt.ids) as sequence:
        side.read(sequence, torch.tensor(prompt.ids))
        live_bytes = side.live_bytes()
        answers = [
            side.answers(sequence, question.asked, question.choices)
            for question in prompt.questions
        ]
    return Heard(answers, live_bytes)


def compare(
    task: str, scores: Sequence[Sequence[Score]], heard: Sequence[tuple[Heard, Heard]]
) -> list[Comparison]:
    """How many answers are right, and how likely the right ones are, of `scores` dense and
    compressed; questions are paired."""
    right = [np.array([score.right for score in side], dtype=np.float64) for side in scores]
    likely = [np.array([score.log_likelihood for score in side]) for side in scores]
    dense_bytes, compressed_bytes = (
        sum(both[side].live_bytes for both in heard) // len(heard) for side in range(2)
    )
    metrics: dict[Metric, tuple[list[Values], float]] = {
        "accuracy": (right, POINTS),
        "log-likelihood": (likely, 1.0),
    }
    return [
        Comparison(
            task,
            metric,
            figures.mean(dense, unit),
            figures.mean(compressed, unit),
            figures.mean(compressed - dense, unit),
            dense_bytes,
            compressed_bytes,
        )
        for metric, ((dense, compressed), unit) in metrics.items()
    ]


def averages(tasks: Sequence[Sequence[Comparison]]) -> list[Comparison]:
    """Each metric over several tasks, each weighing the same."""
    return [_average(lines) for lines in zip(*tasks, strict=True)]


def _average(tasks: Sequence[Comparison]) -> Comparison:
    return Comparison(
        EVERY,
        tasks[0].metric,
        figures.average([task.dense for task in tasks]),
        figures.average([task.compressed for task in tasks]),
        figures.average([task.change for task in tasks]),
        sum(task.dense_bytes for task in tasks) // len(tasks),
        sum(task.compressed_bytes for task in tasks) // len(tasks),
    )


def question(
    tokenizer: PreTrainedTokenizerBase, text: str, continuations: Sequence[str]
) -> Question:
    """`text` and its continuations, split where the tokens of `text` alone end."""
    asked = encode(tokenizer, text)
    whole = [encode(tokenizer, text + more) for more in continuations]
    return Question(asked, [ids[len(asked) :] for ids in whole])
