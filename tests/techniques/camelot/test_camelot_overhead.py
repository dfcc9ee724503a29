"""What a bank really lays out and keeps beside its slots is inside what is planned."""

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ullage import Execution, ModelSpec, resolve
from ullage.kv.banked import BankRow
from ullage.kv.kernels import Piece
from ullage.kv.pool import KVPool
from ullage.kv.rows import NewTokens
from ullage.runtime.load import TORCH_DTYPES
from ullage.specs.workload import Step
from ullage.techniques.camelot.overhead import scratch_bytes, state_bytes
from ullage.techniques.camelot.settings import CAMELoT

TOKENS = 4000
SMALL = CAMELoT(slots=512, segment=64, recent=32)
SWEEP = [
    SMALL,
    replace(SMALL, slots=3000, segment=256),
    replace(SMALL, segment=512, slots=700, positions="constant"),
    replace(SMALL, top_k=1, segment=128),
    replace(SMALL, top_k=4, positions="constant", count_bias=True, centred=True),
    replace(SMALL, count_bias=True, centred=True, count_cap=3, segment=300),
]


class Live(TorchDispatchMode):
    """The most bytes that tensors of operators had at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = self.peak_bytes = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        given = {_key(tensor) for tensor in tree_leaves((args, kwargs)) if _is_tensor(tensor)}
        for tensor in filter(_is_tensor, tree_leaves(result)):
            if _key(tensor) not in given:  # no view
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key = storage._cdata
        if key in self.known:
            return
        self.known.add(key)
        self.live_bytes += storage.nbytes()
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        weakref.finalize(storage, self._gone, key, storage.nbytes())

    def _gone(self, key: int, nbytes: int) -> None:
        self.known.discard(key)
        self.live_bytes -= nbytes


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _key(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def tokens_of(spec: ModelSpec, start: int, stop: int) -> NewTokens:
    random = torch.Generator().manual_seed(start)
    count = stop - start
    shape = (spec.num_kv_heads, count, spec.head_dim)
    query = torch.randn(spec.num_heads, count, spec.head_dim, generator=random)
    keys, values = (torch.randn(*shape, generator=random) for _ in range(2))
    angle = torch.arange(start, stop)[:, None] * torch.logspace(0, -4, spec.head_dim // 2)
    cos, sin = angle.cos().repeat(1, 2), angle.sin().repeat(1, 2)
    return NewTokens(query, keys, values, 0.1, cos, sin)


@pytest.mark.parametrize("technique", SWEEP, ids=str)
@pytest.mark.parametrize(("new_tokens", "kv_dtype"), [(1, "fp32"), (512, "fp32"), (512, "int8")])
def test_what_is_laid_out_is_no_more_than_is_planned(
    technique: CAMELoT, new_tokens: int, kv_dtype: str
) -> None:
    spec = resolve("smollm2-135m")
    rules = technique.rules
    pool = KVPool(4000, spec.head_dim, TORCH_DTYPES[kv_dtype])
    row = BankRow(pool, spec.num_kv_heads, rules)
    row.reserve(TOKENS + 2 * new_tokens + rules.segment)

    def attend(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
        return query

    for at in range(0, TOKENS, 500):
        row.attend_chunk(tokens_of(spec, at, at + 500), attend)
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype)
    work = Step("prefill", 1, TOKENS, new_tokens, execution)
    for start in range(TOKENS, TOKENS + rules.segment + 1, new_tokens):
        new = tokens_of(spec, start, start + new_tokens)
        before = row.beside_bytes
        with Live() as live:
            row.attend(new, attend) if new_tokens > 1 else row.take(new)
        grown = max(0, row.beside_bytes - before)
        assert live.peak_bytes - grown <= scratch_bytes(rules, spec, work)
        assert row.beside_bytes <= state_bytes(rules, spec, TOKENS, kv_dtype)
