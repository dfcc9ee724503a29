"""Texts as tokens, and in pieces of one length."""

from collections.abc import Mapping
from itertools import chain, islice, zip_longest

import torch
from transformers import PreTrainedTokenizerBase


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The tokens of a part of a text, which may be longer than the model reads."""
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def beginning(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before every text: one token, or nothing."""
    first = tokenizer("a")["input_ids"][:1]
    return [*first] if first == [tokenizer.bos_token_id] else []


def cut(tokenizer: PreTrainedTokenizerBase, text: str, tokens: int) -> list[list[int]]:
    """`text` in pieces of `tokens` each, which begin as the model's texts do; a rest that is
    shorter is left out."""
    first, ids = beginning(tokenizer), encode(tokenizer, text)
    room = tokens - len(first)
    return [[*first, *ids[start : start + room]] for start in range(0, len(ids) - room + 1, room)]


def pieces_in_turn(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], tokens: int, count: int
) -> dict[str, torch.Tensor]:
    """Up to `count` pieces of `texts`, [tokens] ids each, by name: the first of each text, then the
    second of each that has one, and so on."""
    by_text = [
        [(f"{name}:{number}", ids) for number, ids in enumerate(cut(tokenizer, text, tokens))]
        for name, text in texts.items()
    ]
    in_turn = filter(None, chain(*zip_longest(*by_text)))
    return {name: torch.tensor(ids) for name, ids in islice(in_turn, count)}
