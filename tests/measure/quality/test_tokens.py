"""Texts in pieces of one length."""

from typing import Any

import torch

from ullage.measure.quality.tokens import cut, pieces_in_turn


class Letters:
    """A tokenizer of letters that begins every text with token 0."""

    bos_token_id = 0

    def __call__(
        self, text: str, add_special_tokens: bool = True, **_: Any
    ) -> dict[str, list[int]]:
        ids = [ord(letter) for letter in text]
        return {"input_ids": [0, *ids] if add_special_tokens else ids}


LETTERS: Any = Letters()


def test_every_piece_begins_as_texts_do_and_a_rest_is_left_out() -> None:
    assert cut(LETTERS, "abcdefgh", 4) == [[0, 97, 98, 99], [0, 100, 101, 102]]
    assert cut(LETTERS, "ab", 4) == []


def test_texts_take_turns_until_there_are_enough() -> None:
    texts = {"long": "abcdef", "short": "xy", "none": "z"}
    assert list(pieces_in_turn(LETTERS, texts, 3, 9)) == ["long:0", "short:0", "long:1", "long:2"]
    found = pieces_in_turn(LETTERS, texts, 3, 2)
    assert list(found) == ["long:0", "short:0"]
    assert torch.equal(found["short:0"], torch.tensor([0, 120, 121]))
