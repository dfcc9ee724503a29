"""Perplexity of the tokens beyond the window, and how far the distributions are from dense."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedTokenizerBase

from ullage.errors import InputError
from ullage.measure.quality import figures
from ullage.measure.quality.figures import Values
from ullage.measure.quality.sides import CHUNK_TOKENS, Side
from ullage.measure.quality.suite import Asked, Found, OnStep
from ullage.measure.quality.tokens import cut
from ullage.specs.evaluation import EVERY, Comparison, Figure, Metric

CHUNKS = 4  # of a text, where --limit does not say
_ROWS = 64  # tokens whose distributions are compared at once


@dataclass(frozen=True)
class Piece:
    """Tokens, [T], and the bytes, as text, of those that are scored."""

    ids: torch.Tensor
    scored_bytes: int


@dataclass(frozen=True)
class Reading:
    """A piece of text that one side read: the loss in nats of each token but the first, [T - 1],
    the divergence KL(first side || this one) where each is to be told, [T - 1], and the live
    bytes at its end."""

    losses: torch.Tensor
    divergences: torch.Tensor
    live_bytes: int


def prepare(
    texts: dict[str, str], tokenizer: PreTrainedTokenizerBase, asked: Asked
) -> dict[str, list[Piece]]:
    """The first pieces of each text.

    Raises:
        InputError: a text of fewer tokens than a piece has, or pieces with nothing to score.
    """
    if asked.tokens < asked.beyond_tokens + 2:
        raise InputError(
            f"--tokens {asked.tokens:,} leaves nothing to score beyond {asked.beyond_tokens:,} "
            "tokens: ask for more, or for a smaller --beyond."
        )
    count = asked.limit or CHUNKS
    return {name: pieces(name, text, tokenizer, asked, count) for name, text in texts.items()}


def measure(
    prepared: dict[str, list[Piece]], sides: tuple[Side, Side], asked: Asked, on_step: OnStep
) -> Found:
    """Each text's figures, and those of all together."""
    total = sum(map(len, prepared.values()))
    every: list[_Scored] = []
    found: list[Comparison] = []
    for name, several in prepared.items():
        first = len(every)
        for piece in several:
            on_step(name, len(every), total)
            every.append(_score(sides, piece, asked.beyond_tokens))
        found += _compare(name, every[first:])
    return Found([*found, *_compare(EVERY, every)])


def pieces(
    name: str, text: str, tokenizer: PreTrainedTokenizerBase, asked: Asked, count: int
) -> list[Piece]:
    """The first `count` pieces of `text`, or as many as there are.

    Raises:
        InputError: there is not one.
    """
    parts = cut(tokenizer, text, asked.tokens)[:count]
    if not parts:
        raise InputError(f"{name} is shorter than the {asked.tokens:,} tokens of --tokens.")
    scored = (tokenizer.decode(part[asked.beyond_tokens + 1 :]) for part in parts)
    return [
        Piece(torch.tensor(part), len(text.encode()))
        for part, text in zip(parts, scored, strict=True)
    ]


def read(sides: Sequence[Side], ids: torch.Tensor) -> list[Reading]:
    """`ids`, [T], in chunks, by all sides in step, so that only one chunk's logits are held."""
    losses: list[list[torch.Tensor]] = [[] for _ in sides]
    divergences: list[list[torch.Tensor]] = [[] for _ in sides]
    with ExitStack() as stack:
        sequences = [stack.enter_context(side.open(len(ids), ids.tolist())) for side in sides]
        for at in range(0, len(ids), CHUNK_TOKENS):
            first = torch.empty(0)
            targets = ids[at + 1 : at + CHUNK_TOKENS + 1]
            for index, (side, sequence) in enumerate(zip(sides, sequences, strict=True)):
                logits = side.logits(sequence, ids[at : at + CHUNK_TOKENS])[: len(targets)]
                first = logits if index == 0 else first
                losses[index].append(_losses(logits, targets))
                divergences[index].append(_divergences(first, logits))
        live_bytes = [side.live_bytes() for side in sides]
    return [
        Reading(torch.cat(losses[index]), torch.cat(divergences[index]), live_bytes[index])
        for index in range(len(sides))
    ]


def _losses(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits, targets.to(logits.device), reduction="none").cpu()


def _divergences(dense: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """KL(dense || other) of each row, [N], some rows at a time."""
    if dense is other:
        return torch.zeros(len(dense))
    parts = [
        F.kl_div(
            theirs.log_softmax(-1), ours.log_softmax(-1), reduction="none", log_target=True
        ).sum(-1)
        for ours, theirs in zip(torch.split(dense, _ROWS), torch.split(other, _ROWS), strict=True)
    ]
    return torch.cat(parts).cpu()


@dataclass(frozen=True)
class _Scored:
    """What both sides made of the scored tokens of a piece, [n] each, and its bytes as text."""

    dense: Values
    compressed: Values
    divergences: Values
    text_bytes: int
    dense_bytes: int
    compressed_bytes: int


def _score(sides: tuple[Side, Side], piece: Piece, beyond_tokens: int) -> _Scored:
    dense, compressed = read(sides, piece.ids)

    def beyond(values: torch.Tensor) -> Values:
        return values[beyond_tokens:].double().numpy()

    return _Scored(
        beyond(dense.losses),
        beyond(compressed.losses),
        beyond(compressed.divergences),
        piece.scored_bytes,
        dense.live_bytes,
        compressed.live_bytes,
    )


def _compare(task: str, scored: list[_Scored]) -> Iterator[Comparison]:
    """A line a metric, over all tokens of several pieces."""
    dense = np.concatenate([one.dense for one in scored])
    compressed = np.concatenate([one.compressed for one in scored])
    divergences = np.concatenate([one.divergences for one in scored])
    text_bytes = sum(one.text_bytes for one in scored)
    bits = [
        figures.bits_per_byte(part, text_bytes) for part in (dense, compressed, compressed - dense)
    ]
    none, kl, tail = (
        Figure(0.0, 0.0, len(dense)),
        figures.mean(divergences),
        figures.percentile(divergences),
    )
    change = figures.perplexity_change(dense, compressed)
    lines: dict[Metric, tuple[Figure, Figure, Figure]] = {
        "perplexity": (figures.perplexity(dense), figures.perplexity(compressed), change),
        "bits per byte": (bits[0], bits[1], bits[2]),
        "mean KLD": (none, kl, kl),
        "99% KLD": (none, tail, tail),
    }
    dense_bytes = sum(one.dense_bytes for one in scored) // len(scored)
    compressed_bytes = sum(one.compressed_bytes for one in scored) // len(scored)
    for metric, three in lines.items():
        yield Comparison(task, metric, *three, dense_bytes, compressed_bytes)
