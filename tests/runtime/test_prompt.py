"""Prompts that are too long are refused by their beginning, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import PromptError
from ullage.runtime.load import load_tokenizer
from ullage.runtime.prompt import refuse_long, token_ids


@pytest.fixture(scope="module")
def tokenizer(model_folder: Callable[[str], Path]) -> Any:
    return load_tokenizer(model_folder("llama"))


@given(st.integers(1, 60), st.integers(0, 300), st.integers(1, 9))
def test_what_can_be_read_is_never_refused(
    tokenizer: Any, most_tokens: int, words: int, blanks: int
) -> None:
    text = ("w6" + blanks * " ") * words
    try:
        refuse_long(text, tokenizer, most_tokens)
    except PromptError:
        assert words > most_tokens


class Counting:
    """A tokenizer of a character a token that knows how much it has read."""

    def __init__(self) -> None:
        self.characters = 0

    def __call__(self, text: str) -> dict[str, str]:
        self.characters += len(text)
        return {"input_ids": text}


@pytest.mark.parametrize("length", [10**4, 10**7])
def test_a_prompt_far_too_long_is_not_tokenized_whole(length: int) -> None:
    counting: Any = Counting()
    with pytest.raises(PromptError, match=f"{length:,} characters"):
        refuse_long("x" * length, counting, 100)
    assert counting.characters == 400


LINES = "It was so.\n\nThen they said:\n'we go', and 12\nof them\n  went\n\n\nOn. " * 40


def trained(kind: str) -> Any:
    """A tokenizer whose tokens are parts of words, and blanks with them, as people use them."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = (
        pre_tokenizers.ByteLevel(add_prefix_space=False)
        if kind == "bytes"
        else pre_tokenizers.Metaspace(prepend_scheme="always")
    )
    core.decoder = decoders.ByteLevel()
    special = ["<unk>", "<bos>", "<eos>"]
    core.train_from_iterator([LINES], trainers.BpeTrainer(vocab_size=150, special_tokens=special))
    around = "<bos> $A <eos>" if kind == "ended" else "<bos> $A"
    ids = [(token, core.token_to_id(token)) for token in special]
    core.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("kind", ["bytes", "blanks put before", "ended"])
@pytest.mark.parametrize("characters", [1, 50, 1000])
def test_a_long_texts_tokens_are_those_of_it_whole(kind: str, characters: int) -> None:
    tokenizer = trained(kind)
    for begins in (True, False):
        whole = tokenizer(LINES, add_special_tokens=begins)["input_ids"]
        assert token_ids(LINES, tokenizer, begins, characters) == whole


def test_a_long_text_is_read_in_pieces() -> None:
    tokenizer, lengths = trained("bytes"), []

    def counting(text: str, **options: Any) -> Any:
        lengths.append(len(text))
        return tokenizer(text, **options)

    token_ids(LINES, counting, piece_characters=200)
    assert max(lengths) < 300
