"""Prompts that are too long are refused by their beginning, and no others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import PromptError
from ullage.runtime.load import load_tokenizer
from ullage.runtime.prompt import refuse_long


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
