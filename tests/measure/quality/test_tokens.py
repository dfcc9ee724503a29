"""Texts in pieces of one length."""

from typing import Any

import pytest
import torch

from ullage.measure.quality.tokens import cut, pieces_in_turn, recalling


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


@pytest.mark.parametrize("tokens", [64, 128, 1000, 8192])
def test_every_other_span_of_the_second_half_was_said_before(tokens: int) -> None:
    ids = torch.arange(tokens)
    told = recalling(ids, 3)
    assert torch.equal(told[: tokens // 2], ids[: tokens // 2])
    assert torch.equal(told, recalling(ids, 3))
    assert torch.equal(ids, torch.arange(tokens))
    for at in range(tokens // 2, tokens - 31, 64):
        again, new = told[at : at + 32], slice(at + 32, min(at + 64, tokens))
        assert int(again.max()) < at - min(256, tokens // 4) + 32
        assert torch.equal(told[new], ids[new])
