"""Long prompts that are read once, and the questions that go on from each."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ullage.measure.quality import figures
from ullage.measure.quality.figures import POINTS
from ullage.measure.quality.sides import Answer, Side
from ullage.specs.evaluation import EVERY, Comparison


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


def hear(side: Side, prompt: Prompt) -> Heard:
    """Read `prompt` and go on from it with each question."""
    with side.open(prompt.tokens) as sequence:
        side.read(sequence, torch.tensor(prompt.ids))
        live_bytes = side.live_bytes()
        answers = [
            side.answers(sequence, question.asked, question.choices)
            for question in prompt.questions
        ]
    return Heard(answers, live_bytes)


def accuracy(
    task: str, right: Sequence[Sequence[bool]], live_bytes: Sequence[Sequence[int]]
) -> Comparison:
    """How many were `right`, dense and compressed, with the bytes of each prompt."""
    dense, compressed = (np.array(side, dtype=np.float64) for side in right)
    dense_bytes, compressed_bytes = (sum(side) // len(side) for side in live_bytes)
    return Comparison(
        task,
        "accuracy",
        figures.mean(dense, POINTS),
        figures.mean(compressed, POINTS),
        figures.mean(compressed - dense, POINTS),
        dense_bytes,
        compressed_bytes,
    )


def average(tasks: Sequence[Comparison]) -> Comparison:
    """One metric over several tasks, each weighing the same."""
    return Comparison(
        EVERY,
        tasks[0].metric,
        figures.average([task.dense for task in tasks]),
        figures.average([task.compressed for task in tasks]),
        figures.average([task.change for task in tasks]),
        sum(task.dense_bytes for task in tasks) // len(tasks),
        sum(task.compressed_bytes for task in tasks) // len(tasks),
    )


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a part of a text."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: one token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return [*first] if first == [tokenizer.bos_token_id] else []


def question(
    tokenizer: PreTrainedTokenizerBase, text: str, continuations: Sequence[str]
) -> Question:
    """`text` and its continuations, split where the tokens of `text` alone end."""
    asked = encode(tokenizer, text)
    whole = [encode(tokenizer, text + more) for more in continuations]
    return Question(asked, [ids[len(asked) :] for ids in whole])
