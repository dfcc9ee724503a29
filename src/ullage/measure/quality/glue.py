"""Few-shot GLUE. lm-eval has the tasks: their prompts, answers and metrics. Ours is what it cannot
do: as many shots as fit, balanced, in a prompt that is read once and that examples go on from."""

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import chain
from typing import Any
from warnings import catch_warnings

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from ullage.errors import InputError
from ullage.measure.quality import figures
from ullage.measure.quality.prompts import (
    Heard,
    Prompt,
    Question,
    accuracy,
    average,
    beginning,
    encode,
    hear,
    question,
)
from ullage.measure.quality.sides import Answer, Side
from ullage.measure.quality.suite import Asked, Found, OnStep
from ullage.measure.quality.tables import Row, Table
from ullage.specs.evaluation import Comparison, Figure, Metric

EXAMPLES = 100  # of a task, where --limit does not say
PROMPTS = 4  # of a task: examples are dealt among them, so that no few shots decide alone
_METRICS: dict[str, Metric] = {"f1": "F1", "mcc": "Matthews"}  # by lm-eval's names


@dataclass(frozen=True)
class Examples:
    """One task: its prompts, and the rows behind the questions of each."""

    task: Any  # lm-eval's
    prompts: list[Prompt]
    rows: list[list[Row]]


def prepare(
    tables: dict[str, Table], tokenizer: PreTrainedTokenizerBase, asked: Asked
) -> dict[str, Examples]:
    """The prompts of every task.

    Raises:
        InputError: lm-eval is not installed, a table has no rows of a label, or `asked.tokens` have
            no room for a shot of each.
    """
    return {name: _examples(name, table, tokenizer, asked) for name, table in tables.items()}


def measure(
    prepared: dict[str, Examples], sides: tuple[Side, Side], asked: Asked, on_step: OnStep
) -> Found:
    """Each task's accuracy, what lm-eval has beside it, and the accuracy over all tasks."""
    total = sum(len(examples.prompts) for examples in prepared.values())
    done, found = 0, []
    for name, examples in prepared.items():
        heard: list[tuple[Heard, Heard]] = []
        for prompt in examples.prompts:
            on_step(name, done, total)
            heard.append((hear(sides[0], prompt), hear(sides[1], prompt)))
            done += 1
        found.append(list(_compare(name, examples, heard)))
    return Found([*chain(*found), average([lines[0] for lines in found])])


def _examples(
    name: str, table: Table, tokenizer: PreTrainedTokenizerBase, asked: Asked
) -> Examples:
    task, draw = _task(name, table), random.Random(f"{name} {asked.seed}")
    limit = asked.limit or EXAMPLES
    if not table.scored or len({row["label"] for row in table.shots}) < 2:
        raise InputError(f"The data of {name} holds no examples, or shots of one label alone.")
    rows = draw.sample(table.scored, min(limit, len(table.scored)))
    dealt = [rows[first::PROMPTS] for first in range(min(PROMPTS, len(rows)))]
    prompts = []
    for some in dealt:
        questions = [_question(task, row, tokenizer) for row in some]
        room = asked.tokens - max(one.tokens for one in questions)
        prompts.append(Prompt(_shots(task, table.shots, tokenizer, room, draw), questions))
    return Examples(task, prompts, dealt)


def _shots(
    task: Any, rows: list[Row], tokenizer: PreTrainedTokenizerBase, room: int, draw: random.Random
) -> list[int]:
    """Solved examples, one of each label after the other, as many as `room` tokens hold.

    Raises:
        InputError: not even one of each.
    """
    ids = beginning(tokenizer)
    by_label = [draw.sample(some, len(some)) for some in _by_label(rows)]
    for count, pair in enumerate(zip(*by_label, strict=False)):
        solved = [encode(tokenizer, _solved(task, row)) for row in draw.sample(pair, len(pair))]
        if len(ids) + sum(map(len, solved)) > room:
            if count == 0:
                raise InputError(
                    f"--tokens has no room for two shots of {task.config.task} and a question: "
                    "ask for more."
                )
            break
        ids += chain(*solved)
    return ids


def _by_label(rows: list[Row]) -> list[list[Row]]:
    return [[row for row in rows if row["label"] == label] for label in (0, 1)]


def _solved(task: Any, row: Row) -> str:
    answer = task.doc_to_choice(row)[task.doc_to_target(row)]
    config = task.config
    return f"{task.doc_to_text(row)}{config.target_delimiter}{answer}{config.fewshot_delimiter}"


def _question(task: Any, row: Row, tokenizer: PreTrainedTokenizerBase) -> Question:
    delimiter = task.config.target_delimiter
    choices = [f"{delimiter}{choice}" for choice in task.doc_to_choice(row)]
    return question(tokenizer, task.doc_to_text(row), choices)


def _compare(
    name: str, examples: Examples, heard: Sequence[tuple[Heard, Heard]]
) -> Iterator[Comparison]:
    """Accuracy first."""
    rows = list(chain(*examples.rows))
    scores = []
    for side in range(2):
        answers = list(chain(*(both[side].answers for both in heard)))
        scores.append([_scores(examples.task, *one) for one in zip(rows, answers, strict=True)])
    right = [[score["right"] for score in side] for side in scores]
    live_bytes = [[both[side].live_bytes for both in heard] for side in range(2)]
    yield (found := accuracy(name, right, live_bytes))
    for theirs, metric in _METRICS.items():
        if theirs in scores[0][0]:
            three = _jackknifed(examples.task.aggregation()[theirs], theirs, scores)
            yield Comparison(name, metric, *three, found.dense_bytes, found.compressed_bytes)


def _scores(task: Any, row: Row, answers: list[Answer]) -> dict[str, Any]:
    """By metric what lm-eval makes of one example, and whether its likeliest choice is right."""
    likely = [answer.log_likelihood for answer in answers]
    results = [(answer.log_likelihood, answer.greedy) for answer in answers]
    right = int(np.argmax(likely)) == task.doc_to_target(row)
    return {**task.process_results(row, results), "right": right}


def _jackknifed(
    aggregate: Any, metric: str, scores: list[list[dict[str, Any]]]
) -> tuple[Figure, Figure, Figure]:
    """A metric of all examples together, dense, compressed, and the change."""

    def of(side: int, index: NDArray[np.int64]) -> float:
        return float(aggregate([scores[side][one][metric] for one in index]))

    n = len(scores[0])
    with catch_warnings(action="ignore"):  # scikit-learn's, of examples that are all of one label
        return (
            figures.jackknife(lambda index: of(0, index), n),
            figures.jackknife(lambda index: of(1, index), n),
            figures.jackknife(lambda index: of(1, index) - of(0, index), n),
        )


def _task(name: str, table: Table) -> Any:
    """lm-eval's task on our rows; nothing is asked of a hub."""
    try:
        import yaml
        from datasets import Dataset
        from lm_eval.api.task import ConfigurableTask
    except ImportError as error:
        raise InputError("GLUE needs lm-eval: pip install 'ullage[eval]'.") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it tells of its defaults
    text = (files("lm_eval") / "tasks" / "glue" / name / "default.yaml").read_text()
    config = yaml.safe_load(text)
    for unused in ("tag", "training_split"):  # there is no index of tasks, and shots are ours
        del config[unused]
    rows = {config["validation_split"]: Dataset.from_list(table.scored)}
    return ConfigurableTask(config=config | {"custom_dataset": lambda **_: rows})
