"""Perplexity beyond the window, and the divergence from dense, on tiny models."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage.errors import InputError
from ullage.measure.quality import perplexity
from ullage.measure.quality.suite import Asked, Found
from ullage.measure.quality.texts import read_texts
from ullage.specs.blocks import sequence_bytes
from ullage.specs.evaluation import EVERY, Comparison
from ullage.specs.model import ModelSpec

ASKED = Asked(tokens=200, beyond_tokens=32, limit=2, seed=0)
Sides = Callable[..., tuple[Any, Any]]
Words = Callable[..., str]


def found_by(sides: tuple[Any, Any], texts: dict[str, str], tokenizer: Any) -> Found:
    prepared = perplexity.prepare(texts, tokenizer, ASKED)
    return perplexity.measure(prepared, sides, ASKED, lambda what, done, total: None)


def line_of(found: Found, metric: str, task: str = EVERY) -> Comparison:
    return next(line for line in found.comparisons if (line.task, line.metric) == (task, metric))


def test_neutral_settings_change_nothing_at_all(
    sides_of: Sides, words: Words, tokenizer: Any
) -> None:
    found = found_by(sides_of("dms:kept=1.0"), {"a": words(400)}, tokenizer)
    for line in found.comparisons:
        assert (line.change.value, line.change.error) == (0.0, 0.0)
        assert line.dense == line.compressed
        assert line.dense_bytes == line.compressed_bytes


def test_figures_are_those_of_one_pass_over_the_whole_text(
    sides_of: Sides, words: Words, tokenizer: Any
) -> None:
    """Against plain transformers: the mean loss beyond, in chunks and over a cache."""
    text = words(200)
    sides = sides_of("dms:kept=0.25,window=16")
    found = found_by(sides, {"a": text}, tokenizer)
    model, ids = sides[0].model, tokenizer(text, return_tensors="pt").input_ids
    model.set_attn_implementation("eager")
    with torch.inference_mode():
        logits = model(ids, use_cache=False).logits[0]
    losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")[32:]
    line = line_of(found, "perplexity")
    assert line.dense.value == pytest.approx(float(losses.mean().exp()), rel=1e-4)
    assert line.dense.n == len(losses) == 200 - 33
    bits = line_of(found, "bits per byte").dense.value
    scored = " ".join(text.split()[33:])
    assert bits == pytest.approx(float(losses.sum()) / 0.6931472 / len(scored), rel=1e-4)


def test_compression_costs_something_and_tells_its_live_bytes(
    sides_of: Sides, words: Words, tokenizer: Any, tiny_spec: Callable[..., ModelSpec]
) -> None:
    dense, sparse = sides_of("dms:kept=0.25,window=16")
    found = found_by((dense, sparse), {"a": words(400), "b": words(400, 1)}, tokenizer)
    assert [line.task for line in found.comparisons[::4]] == ["a", "b", EVERY]
    line, kl = line_of(found, "perplexity"), line_of(found, "mean KLD")
    assert line.change.error > 0
    assert line.change.value == pytest.approx(100 * (line.compressed.value / line.dense.value - 1))
    assert 0 < kl.change.value < line_of(found, "99% KLD").change.value
    for side, told in ((dense, line.dense_bytes), (sparse, line.compressed_bytes)):
        with side.open(200):
            assert told == side.cache.nbytes()
    assert line.dense_bytes == sequence_bytes(tiny_spec("llama"), 200, "fp32")


def test_the_divergence_is_that_of_the_two_distributions(sides_of: Sides) -> None:
    sides = sides_of("dms:kept=0.25,window=16")
    ids = torch.randint(6, 64, (100,), generator=torch.Generator().manual_seed(1))
    dense, sparse = perplexity.read(sides, ids)
    logits = []
    for side in sides:
        with side.open(100) as sequence:
            logits.append(side.logits(sequence, ids)[:-1])
    ours, theirs = (torch.distributions.Categorical(logits=one) for one in logits)
    expected = torch.distributions.kl_divergence(ours, theirs)
    torch.testing.assert_close(sparse.divergences, expected, rtol=1e-3, atol=1e-5)
    assert not dense.divergences.any()


def test_every_piece_begins_as_the_models_texts_do(words: Words, tokenizer: Any) -> None:
    """Where the tokenizer puts a token before a text, the second piece has it too."""

    class Beginning:
        """The tokenizer with token 1 before every text."""

        bos_token_id = 1
        decode = staticmethod(tokenizer.decode)

        def __call__(
            self, text: str, add_special_tokens: bool = True, **_: Any
        ) -> dict[str, list[int]]:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            return {"input_ids": [1, *ids] if add_special_tokens else ids}

    text = words(398)
    made: Any = Beginning()
    first, second = perplexity.prepare({"a": text}, made, ASKED)["a"]
    assert (first.ids[0], second.ids[0]) == (1, 1)
    read = torch.cat([first.ids[1:], second.ids[1:]])
    assert read.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(first.ids) == len(second.ids) == ASKED.tokens
    assert first.scored_bytes == len(" ".join(text.split()[32:199]))


def test_texts_too_short_for_a_piece_are_refused(words: Words, tokenizer: Any) -> None:
    with pytest.raises(InputError, match="a is shorter than the 200 tokens"):
        perplexity.prepare({"a": words(199)}, tokenizer, ASKED)
    with pytest.raises(InputError, match="nothing to score"):
        perplexity.prepare({"a": words(400)}, tokenizer, replace(ASKED, beyond_tokens=199))


def test_a_book_is_read_without_what_gutenberg_adds(tmp_path: Path) -> None:
    book = tmp_path / "books" / "moby_dick.txt"
    book.parent.mkdir()
    (tmp_path / "other.txt").write_text("not read beside a known text")
    book.write_text(
        "\ufeffThe EBook\n*** START OF THIS PROJECT GUTENBERG EBOOK MOBY DICK ***\nCONTENTS\n"
        "Call me Ishmael. Some years ago\n*** END OF THIS PROJECT GUTENBERG EBOOK ***\nlicense"
    )
    assert read_texts(tmp_path) == {"moby_dick": "Call me Ishmael. Some years ago\n"}
    book.write_text("no such marks")
    assert read_texts(tmp_path) == {"moby_dick": "no such marks"}
    book.unlink()
    assert read_texts(tmp_path) == {"other": "not read beside a known text"}


def test_folders_without_texts_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="and no other"):
        read_texts(tmp_path)
    with pytest.raises(InputError, match="no folder"):
        read_texts(tmp_path / "none")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_texts(tmp_path)
