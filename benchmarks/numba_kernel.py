"""Decode attention on CPU compiled by numba, in fp32: to be held against ullage's kernel.

One call for all heads, whose entries are read where they lie: a head's keys and values once for its
group of query heads. Only `decode_attention.py --numba` uses it; docs/dms.md says what it found.
"""

from typing import Any

import numba
import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from ullage.kv.kernels import Piece

Array = np.ndarray[Any, Any]


@intrinsic
def _pointer(typing_context: Any, address: Any) -> Any:
    """An address as a pointer, which numba has no word for."""

    def made(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.inttoptr(args[0], cgutils.voidptr_t)

    return types.voidptr(address), made


@numba.njit(fastmath=True)
def _weights(query: Array, keys: Array, scale: float) -> Array:
    """Softmax of the scores of queries [G, D] with keys [T, D], not yet divided: [G, T]."""
    scores = np.empty((len(query), len(keys)), np.float32)
    for token in range(len(keys)):
        for at in range(len(query)):
            product = np.float32(0)
            for d in range(keys.shape[1]):
                product += query[at, d] * keys[token, d]
            scores[at, token] = product * np.float32(scale)
    for at in range(len(query)):
        scores[at] = np.exp(scores[at] - scores[at].max())
    return scores


@numba.njit(fastmath=True)
def _weighed(weights: Array, values: Array, output: Array) -> None:
    """The values [T, D], weighed, into [G, D]."""
    for token in range(len(values)):
        for at in range(len(weights)):
            for d in range(values.shape[1]):
                output[at, d] += weights[at, token] * values[token, d]
    for at in range(len(weights)):
        output[at] /= weights[at].sum()


@numba.njit(parallel=True, fastmath=True)
def _attend(query: Array, keys_at: Array, values_at: Array, lengths: Array, scale: float) -> Array:
    """[heads, G, D] from queries of that shape; entry addresses and lengths [heads]."""
    output = np.zeros_like(query)
    for head in numba.prange(len(query)):
        shape = (lengths[head], query.shape[2])
        keys = numba.carray(_pointer(keys_at[head]), shape, np.float32)
        values = numba.carray(_pointer(values_at[head]), shape, np.float32)
        _weighed(_weights(query[head], keys, scale), values, output[head])
    return output


def attend(query: torch.Tensor, pieces: list[Piece], scale: float) -> torch.Tensor:
    """Of a query [Hq, 1, D] over pieces of one KV head each, in the order of their query heads."""
    numbers = query.view(len(pieces), -1, query.shape[2]).numpy()
    keys_at, values_at, lengths = (
        np.array(column, np.int64)
        for column in zip(
            *((piece.keys.data_ptr(), piece.values.data_ptr(), len(piece)) for piece in pieces),
            strict=True,
        )
    )
    output = _attend(numbers, keys_at, values_at, lengths, scale)
    return torch.from_numpy(output).view(query.shape)
