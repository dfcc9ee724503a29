"""Few-shot tasks on a tiny model that reads bytes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ullage.errors import InputError
from ullage.measure.quality import glue
from ullage.measure.quality.suite import Asked, Found
from ullage.measure.quality.tables import Row, Table
from ullage.specs.evaluation import EVERY

Sides = Callable[..., tuple[Any, Any]]
ASKED = Asked(tokens=400, beyond_tokens=0, limit=6, seed=0)
BYTES = {"vocab_size": 256, "max_position_embeddings": 512, "bos_token_id": None}


ROWS = [Row({"sentence": f"{'good' if n % 2 else 'bad'} {n}"}, n % 2) for n in range(40)]
LIKELIHOOD = "log-likelihood"
TABLES = dict.fromkeys(("sst2", "cola"), Table(ROWS[:20], ROWS[20:]))


@pytest.fixture(scope="module")
def prepared(byte_tokenizer: Any) -> dict[str, glue.Examples]:
    return glue.prepare(TABLES, byte_tokenizer, ASKED)


def found_by(sides: tuple[Any, Any], prepared: dict[str, glue.Examples]) -> Found:
    return glue.measure(prepared, sides, ASKED, lambda what, done, total: None)


def test_prompts_are_full_of_balanced_shots(
    prepared: dict[str, glue.Examples], byte_tokenizer: Any
) -> None:
    assert len(prepared["sst2"].prompts) == glue.PROMPTS
    for prompt in prepared["sst2"].prompts:
        text = byte_tokenizer.decode(prompt.ids)
        assert text.endswith("\n\n")
        shots = text.split("\n\n")[:-1]
        answers = [shot.rsplit(" ", 1)[1] for shot in shots]
        assert answers.count("positive") == answers.count("negative") == len(shots) // 2 > 1
        for shot in shots:
            assert shot.startswith("Review: good") == shot.endswith("positive")
        assert ASKED.tokens - 2 * max(map(len, shots)) - 4 < prompt.tokens <= ASKED.tokens
    shuffled = {tuple(prompt.ids) for prompt in prepared["sst2"].prompts}
    assert len(shuffled) == glue.PROMPTS


def test_every_example_is_asked_once_and_none_is_a_shot(
    prepared: dict[str, glue.Examples], byte_tokenizer: Any
) -> None:
    examples = prepared["sst2"]
    asked = [question.asked for prompt in examples.prompts for question in prompt.questions]
    texts = [byte_tokenizer.decode(ids).split("\n")[0] for ids in asked]
    assert len(set(texts)) == len(texts) == ASKED.limit
    labels = [label for several in examples.labels for label in several]
    assert [text.startswith("Review: good") for text in texts] == labels
    shots = byte_tokenizer.decode(examples.prompts[0].ids)
    assert not any(f"{text}\n" in shots for text in texts)


def test_the_same_seed_draws_the_same(
    prepared: dict[str, glue.Examples], byte_tokenizer: Any
) -> None:
    again = glue.prepare(TABLES, byte_tokenizer, ASKED)
    other = glue.prepare(TABLES, byte_tokenizer, Asked(400, 0, 6, seed=1))
    assert again["cola"].prompts == prepared["cola"].prompts
    assert other["cola"].prompts != prepared["cola"].prompts


def test_neutral_settings_change_no_answer(
    sides_of: Sides, prepared: dict[str, glue.Examples]
) -> None:
    found = found_by(sides_of("dms:kept=1.0", tokens=ASKED.tokens, **BYTES), prepared)
    lines = [(line.task, line.metric) for line in found.comparisons]
    assert lines == [
        (task, metric) for task in ("sst2", "cola", EVERY) for metric in ("accuracy", LIKELIHOOD)
    ]
    for line in found.comparisons:
        assert (line.change.value, line.change.error) == (0.0, 0.0)
        assert line.dense_bytes == line.compressed_bytes > 0
    assert found.comparisons[-1].dense.n == 12


def test_figures_are_those_of_one_pass_over_shots_and_example(
    sides_of: Sides, prepared: dict[str, glue.Examples]
) -> None:
    """Against plain transformers, without a cache or a copy."""
    dense, sparse = sides_of("dms:kept=0.25,window=16", tokens=ASKED.tokens, **BYTES)
    found = found_by((dense, sparse), prepared)
    model, examples = dense.model, prepared["sst2"]
    model.set_attn_implementation("eager")
    right, likelihoods = [], []
    for prompt, labels in zip(examples.prompts, examples.labels, strict=True):
        for question, label in zip(prompt.questions, labels, strict=True):
            likely = []
            for choice in question.choices:
                ids = torch.tensor([[*prompt.ids, *question.asked, *choice]])
                with torch.inference_mode():
                    logits = model(ids, use_cache=False).logits[0].log_softmax(-1)
                at = range(ids.shape[1] - len(choice) - 1, ids.shape[1] - 1)
                likely.append(sum(float(logits[n, t]) for n, t in zip(at, choice, strict=True)))
            right.append(likely.index(max(likely)) == label)
            likelihoods.append(likely[label])
    accuracy, likelihood = found.comparisons[:2]
    assert accuracy.dense.value == pytest.approx(100 * sum(right) / len(right))
    assert likelihood.dense.value == pytest.approx(sum(likelihoods) / len(right), rel=1e-4)
    assert likelihood.change.error > 0
    assert likelihood.compressed_bytes < likelihood.dense_bytes


def test_what_there_is_no_room_or_no_row_for_is_refused(
    prepared: dict[str, glue.Examples], byte_tokenizer: Any
) -> None:
    with pytest.raises(InputError, match="no room for two shots of sst2"):
        glue.prepare(TABLES, byte_tokenizer, Asked(100, 0, 6, 0))
    one_label = Table(TABLES["sst2"].shots[::2], TABLES["sst2"].scored)
    with pytest.raises(InputError, match="one label alone"):
        glue.prepare({"sst2": one_label}, byte_tokenizer, ASKED)
