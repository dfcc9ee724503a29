"""What was said once in a long prompt, on a tiny model that reads bytes."""

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ullage.errors import InputError
from ullage.measure.quality import retrieval
from ullage.measure.quality.prompts import Heard, Prompt
from ullage.measure.quality.sides import Answer
from ullage.measure.quality.suite import Asked, Found
from ullage.measure.quality.texts import read_essays
from ullage.specs.evaluation import EVERY

Sides = Callable[..., tuple[Any, Any]]
ASKED = Asked(tokens=4000, beyond_tokens=0, limit=16, seed=0)
BYTES = {"vocab_size": 256, "max_position_embeddings": 4096, "bos_token_id": None}


def letters(count: int, draw: random.Random) -> str:
    return "".join(draw.choice("abcdefgh") for _ in range(count))


@pytest.fixture(scope="module")
def essays() -> str:
    draw = random.Random(0)
    sentences = [f"It {letters(5, draw)} {letters(6, draw)}." for _ in range(300)]
    return " ".join(sentences)


@pytest.fixture(scope="module")
def prepared(essays: str, byte_tokenizer: Any) -> list[Prompt]:
    return retrieval.prepare(essays, byte_tokenizer, ASKED)


def asked_of(prompt: Prompt, tokenizer: Any) -> dict[str, list[list[str]]]:
    """By form and depth the steps of a question, each with its answer."""
    texts = iter([tokenizer.decode(one.asked + one.choices[0]) for one in prompt.questions])
    found = {
        form: [[next(texts) for _ in range(steps)] for _ in retrieval.DEPTHS]
        for form, steps in retrieval.FORMS.items()
    }
    assert not list(texts)
    return found


def test_prompts_fill_the_length(prepared: list[Prompt]) -> None:
    assert len(prepared) == 2  # of eight questions of a form
    for prompt in prepared:
        assert 0.95 * ASKED.tokens < prompt.tokens <= ASKED.tokens


@pytest.mark.parametrize("form", retrieval.FORMS)
def test_what_is_asked_was_said_once_at_its_depth(
    prepared: list[Prompt], byte_tokenizer: Any, form: str
) -> None:
    for prompt in prepared:
        text = byte_tokenizer.decode(prompt.ids)
        asked = asked_of(prompt, byte_tokenizer)[form]
        for depth, steps in zip(retrieval.DEPTHS, asked, strict=True):
            said = steps[-1].strip().split(". ")[-1]  # the last step
            assert text.count(said) == 1
            assert text.index(said) / len(text) == pytest.approx(depth, abs=0.0625)


def test_the_other_name_comes_after_the_number_and_is_asked_before_it(
    prepared: list[Prompt], byte_tokenizer: Any
) -> None:
    text = byte_tokenizer.decode(prepared[0].ids)
    for first, last in asked_of(prepared[0], byte_tokenizer)["variables"]:
        other, number = last.strip().split(". ")
        assert first.strip() == other
        assert text.index(number) < text.index(other)


def test_prompts_are_drawn_by_the_seed(
    prepared: list[Prompt], essays: str, byte_tokenizer: Any
) -> None:
    assert retrieval.prepare(essays, byte_tokenizer, ASKED) == prepared
    other = retrieval.prepare(essays, byte_tokenizer, replace(ASKED, seed=1))
    assert not any(ours == theirs for ours, theirs in zip(prepared, other, strict=True))
    assert prepared[0] != prepared[1]


def found_by(knows: tuple[Callable[[int], bool], Callable[[int], bool]], prepared: Any) -> Found:
    """What is found where each side knows the question's number in its prompt, or not."""

    def hear(side: Callable[[int], bool], prompt: Any) -> Heard:
        answers = [[Answer(-1.0, side(at))] for at in range(len(prompt.questions))]
        return Heard(answers, 100 if side is knows[0] else 50)

    patch = pytest.MonkeyPatch()
    with patch.context() as context:
        context.setattr(retrieval, "hear", hear)
        return retrieval.measure(prepared, knows, ASKED, lambda *_: None)  # type: ignore[arg-type]


def test_right_answers_are_counted_by_depth_and_all_steps_must_be_right(
    prepared: list[Prompt],
) -> None:
    forgotten = (0, 3, 19)  # needles at two depths, the second step of a variable at another
    found = found_by((lambda at: True, lambda at: at not in forgotten), prepared)
    right = {
        form: [cell.compressed for cell in found.cells if cell.task == form]
        for form in retrieval.FORMS
    }
    assert right == {
        "needle": [0, 2, 2, 0, 2, 2, 2, 2],
        "key-value": [2] * 8,
        "variables": [2, 0, *[2] * 6],
    }
    assert all((cell.dense, cell.n) == (2, 2) for cell in found.cells)
    line = found.comparisons[0]
    assert (line.task, line.dense.value, line.compressed.value) == ("needle", 100, 75)
    assert (line.change.value, line.change.n) == (-25, 16)
    assert line.change.error == pytest.approx(100 * (0.25 * 0.75 / 15) ** 0.5)
    assert (line.dense_bytes, line.compressed_bytes) == (100, 50)
    steps = next(
        one for one in found.comparisons if one.task == "variables" and "log" in one.metric
    )
    assert steps.dense.value == -2  # of both
    every = found.comparisons[-2]
    assert (every.task, every.metric) == (EVERY, "accuracy")
    assert every.change.value == pytest.approx(-(25 + 12.5) / 3)


def test_neutral_settings_change_no_answer(sides_of: Sides, prepared: list[Prompt]) -> None:
    sides = sides_of("dms:kept=1.0", tokens=ASKED.tokens, **BYTES)
    found = retrieval.measure(prepared[:1], sides, ASKED, lambda *_: None)
    assert [line.change.value for line in found.comparisons] == [0.0] * 8
    assert found.comparisons[0].dense_bytes == found.comparisons[0].compressed_bytes


def test_no_room_and_no_essays_are_refused(
    essays: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"--tokens [\d,]+ has no room for what is asked"):
        retrieval.prepare(essays, byte_tokenizer, replace(ASKED, tokens=1200))
    with pytest.raises(InputError, match="too short for prompts of that length"):
        retrieval.prepare(essays[:2000], byte_tokenizer, ASKED)
    with pytest.raises(InputError, match="have 2 words: 40 are needed"):
        retrieval.prepare("It rains cats.", byte_tokenizer, ASKED)
    with pytest.raises(InputError, match="no folder"):
        read_essays(tmp_path)
    (tmp_path / "essays").mkdir()
    with pytest.raises(InputError, match="holds no"):
        read_essays(tmp_path)
