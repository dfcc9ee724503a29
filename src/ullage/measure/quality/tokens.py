"""Texts as tokens, and in pieces of one length."""

import random
from collections.abc import Mapping
from itertools import chain, islice, zip_longest

import torch
from transformers import PreTrainedTokenizerBase

_SPAN_TOKENS = 32  # that are said again
_APART_TOKENS = 256  # from where they were said first, at least


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


def recalling(ids: torch.Tensor, seed: int) -> torch.Tensor:
    """`ids`, [T], in whose second half every other span is one from further back once more. Running
    prose seldom asks for what was said once, and what finds it again would look useless."""
    draw, told = random.Random(seed), ids.clone()
    apart = min(_APART_TOKENS, len(ids) // 4)
    for at in range(len(ids) // 2, len(ids) - _SPAN_TOKENS + 1, 2 * _SPAN_TOKENS):
        start = draw.randrange(1, at - apart)
        told[at : at + _SPAN_TOKENS] = told[start : start + _SPAN_TOKENS].clone()
    return told
