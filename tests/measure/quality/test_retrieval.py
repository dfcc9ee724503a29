"""What was said once in a long prompt, on a tiny model that reads bytes."""

import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ullage.errors import InputError
from ullage.measure.quality import retrieval
from ullage.measure.quality.prompts import Heard
from ullage.measure.quality.sides import Answer
from ullage.measure.quality.suite import Asked, Found
from ullage.measure.quality.texts import read_essays
from ullage.specs.evaluation import EVERY

Sides = Callable[..., tuple[Any, Any]]
ASKED = Asked(tokens=4000, beyond_tokens=0, limit=10, seed=0)
BYTES = {"vocab_size": 256, "max_position_embeddings": 4096, "bos_token_id": None}


def letters(count: int, draw: random.Random) -> str:
    return "".join(draw.choice("abcdefgh") for _ in range(count))


@pytest.fixture(scope="module")
def essays() -> str:
    draw = random.Random(0)
    sentences = [f"It {letters(5, draw)} {letters(6, draw)}." for _ in range(300)]
    return " ".join(sentences)


@pytest.fixture(scope="module")
def prepared(essays: str, byte_tokenizer: Any) -> list[retrieval.Asking]:
    return retrieval.prepare(essays, byte_tokenizer, ASKED)


def asking(prepared: list[retrieval.Asking], form: str, tokens: int) -> retrieval.Asking:
    return next(one for one in prepared if (one.form, one.tokens) == (form, tokens))


def test_every_form_fills_every_length_and_is_asked_at_every_depth(
    prepared: list[retrieval.Asking],
) -> None:
    assert [(one.form, one.tokens) for one in prepared] == [
        (form, tokens)
        for form in ("needle", "key-value", "variables")
        for tokens in (1000, 2000, 4000)
    ]
    for one in prepared:
        assert len(one.prompts) == 2  # of five questions
        for prompt in one.prompts:
            steps = 2 if one.form == "variables" else 1
            assert len(prompt.questions) == steps * len(retrieval.DEPTHS)
            assert 0.9 * one.tokens < prompt.tokens <= one.tokens


@pytest.mark.parametrize("form", ["needle", "key-value", "variables"])
def test_what_is_asked_was_said_once_at_its_depth(
    prepared: list[retrieval.Asking], byte_tokenizer: Any, form: str
) -> None:
    one = asking(prepared, form, 4000)
    for prompt in one.prompts:
        text = byte_tokenizer.decode(prompt.ids)
        steps = len(prompt.questions) // len(retrieval.DEPTHS)
        for depth, question in zip(retrieval.DEPTHS, prompt.questions[::-steps][::-1], strict=True):
            asked = byte_tokenizer.decode(question.asked).strip().split(". ")[-1]  # the last step
            said = asked + byte_tokenizer.decode(question.choices[0])
            assert text.count(said) == 1
            assert text.index(said) / len(text) == pytest.approx(depth, abs=0.06)


def test_the_other_name_stands_between_its_depth_and_the_next(
    prepared: list[retrieval.Asking], byte_tokenizer: Any
) -> None:
    prompt = asking(prepared, "variables", 4000).prompts[0]
    text = byte_tokenizer.decode(prompt.ids)
    numbers = [found.start() for found in re.finditer("The magic number of", text)]
    others = [found.start() for found in re.finditer("The other name of", text)]
    assert sorted([*numbers, *others]) == [
        place for pair in zip(numbers, others, strict=True) for place in pair
    ]


def test_prompts_are_drawn_by_the_seed(
    prepared: list[retrieval.Asking], essays: str, byte_tokenizer: Any
) -> None:
    assert retrieval.prepare(essays, byte_tokenizer, ASKED) == prepared
    other = retrieval.prepare(essays, byte_tokenizer, replace(ASKED, seed=1))
    for ours, theirs in zip(prepared, other, strict=True):
        assert ours.prompts != theirs.prompts
    assert prepared[0].prompts[0] != prepared[0].prompts[1]


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
    prepared: list[retrieval.Asking],
) -> None:
    found = found_by((lambda at: True, lambda at: at not in (0, 3)), prepared)
    needle = [cell for cell in found.cells if (cell.task, cell.tokens) == ("needle", 2000)]
    assert [cell.compressed for cell in needle] == [0, 2, 2, 0, 2]
    assert all((cell.dense, cell.n) == (2, 2) for cell in needle)
    chains = [cell for cell in found.cells if (cell.task, cell.tokens) == ("variables", 2000)]
    assert [cell.compressed for cell in chains] == [0, 0, 2, 2, 2]
    line = found.comparisons[0]
    assert (line.task, line.dense.value, line.compressed.value) == ("needle 1,000", 100, 60)
    assert line.change.value == -40
    assert line.change.error == pytest.approx(100 * (0.24 / 9) ** 0.5)
    assert (line.dense_bytes, line.compressed_bytes) == (100, 50)
    assert found.comparisons[-1].task == EVERY
    assert found.comparisons[-1].change.value == pytest.approx(-40)


def test_neutral_settings_change_no_answer(
    sides_of: Sides, prepared: list[retrieval.Asking]
) -> None:
    sides = sides_of("dms:kept=1.0", tokens=ASKED.tokens, **BYTES)
    found = retrieval.measure(prepared[:1], sides, ASKED, lambda *_: None)
    assert [line.change.value for line in found.comparisons] == [0.0, 0.0]
    assert found.comparisons[0].dense_bytes == found.comparisons[0].compressed_bytes


def test_no_room_and_no_essays_are_refused(
    essays: str, byte_tokenizer: Any, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="no room for 5 facts"):
        retrieval.prepare(essays, byte_tokenizer, replace(ASKED, tokens=400))
    with pytest.raises(InputError, match="too short for prompts of that length"):
        retrieval.prepare(essays[:2000], byte_tokenizer, ASKED)
    few = essays + " It is. " * 2000
    with pytest.raises(InputError, match="words: too few for 16,000 tokens"):
        retrieval.prepare(few, byte_tokenizer, replace(ASKED, tokens=16000))
    with pytest.raises(InputError, match="have 2 words: 5 are needed"):
        retrieval.prepare("It rains cats.", byte_tokenizer, ASKED)
    with pytest.raises(InputError, match="no folder"):
        read_essays(tmp_path)
    (tmp_path / "essays").mkdir()
    with pytest.raises(InputError, match="holds no"):
        read_essays(tmp_path)
