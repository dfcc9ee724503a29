"""An associative memory's contents, and how they change when tokens are written (CAMELoT, arXiv
2402.13449): what is like a slot is merged into it, what is new takes a slot, the stalest if none is
free.

Each KV head by itself. Tokens are compared with the slots as they were before all of them, so that
one product says all likenesses. Merging comes first; then what is new takes slots, a token after
the other, the stalest first, round and round. Where the memory is empty, the first token has a slot
before the others are compared.
"""

from dataclasses import dataclass, replace

import torch
from torch.nn.functional import normalize

_NONE = -2.0  # below any likeness
# Likenesses are told apart this finely: two slots with the same token's key are equally like a
# third, and rounding in the model is not to choose between them.
GRID = 2**-10


@dataclass(frozen=True)
class Directions:
    """Where the M slots of each KV head point: what keys are likened to."""

    slots: torch.Tensor  # [Hkv, M, D], of length 1 / GRID, or 0 where empty
    least: torch.Tensor  # [Hkv, 1, M], added to each likeness
    middle: torch.Tensor | None  # [Hkv, 1, D], what keys are likened from if that is not 0

    @property
    def nbytes(self) -> int:
        """What it holds."""
        middle_bytes = 0 if self.middle is None else self.middle.nbytes
        return self.slots.nbytes + self.least.nbytes + middle_bytes

    def likeness(self, keys: torch.Tensor) -> torch.Tensor:
        """Cosine of each of `keys`, [Hkv, N, D], with each slot, [Hkv, N, M], in steps of `GRID`;
        -2 with an empty one. As it is large, it is gone through as seldom as can be."""
        if self.middle is not None:
            keys = keys - self.middle
        keys = normalize(keys, dim=-1)
        return torch.baddbmm(self.least, keys, self.slots.transpose(1, 2)).round_()

    def nearest(self, keys: torch.Tensor, count: int) -> torch.Tensor:
        """Bool [Hkv, N, M]: the `count` slots that are likest to each of `keys`, [Hkv, N, D], of
        those equally like it the first."""
        likeness = self.likeness(keys)
        order = torch.arange(likeness.shape[2], device=keys.device)
        likest = (likeness.double() - order / 2**32).topk(min(count, len(order))).indices
        return torch.zeros_like(likeness, dtype=torch.bool).scatter_(2, likest, True)


@dataclass(frozen=True)
class Memory:
    """M slots of each KV head. An empty slot's stamp is below 0, and what is in it of no meaning;
    another's is the position of the newest token in it. No two of a head's stamps are the same.
    `centred`: keys are compared by what sets them apart from the mean of the slots' keys, as those
    of many heads are much alike."""

    keys: torch.Tensor  # [Hkv, M, D] in fp32, before their rotation
    values: torch.Tensor  # [Hkv, M, D] in fp32
    counts: torch.Tensor  # [Hkv, M] int32, the tokens that are merged in each
    stamps: torch.Tensor  # [Hkv, M] int32
    centred: bool = False

    def directions(self) -> "Directions":
        """Where its slots point."""
        filled, mine, middle = self.stamps >= 0, self.keys, None
        if self.centred:
            share = filled.float() / filled.sum(1, keepdim=True).clamp(min=1)  # [Hkv, M]
            middle = share[:, None] @ mine
            mine = mine - middle
        mine = normalize(mine, dim=-1) * (filled[..., None] / GRID)
        return Directions(mine, torch.where(filled, 0.0, _NONE / GRID)[:, None], middle)

    def written(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        stamps: torch.Tensor,
        threshold: float,
        empty: bool,
    ) -> "Memory":
        """The memory after N tokens more, keys and values [Hkv, N, D], stamps [N], which ascend.
        `empty`: nothing was ever written."""
        if not empty:
            steps, slot = self.directions().likeness(keys).max(-1)  # [Hkv, N] each
            merging = steps * GRID >= threshold
            merged = self._merged(keys, values, stamps, slot, merging)
            return merged._placed(keys, values, stamps, ~merging)
        first, rest = slice(0, 1), slice(1, None)
        new = torch.ones_like(keys[:, first, 0], dtype=torch.bool)
        begun = self._placed(keys[:, first], values[:, first], stamps[first], new)
        if keys.shape[1] == 1:
            return begun
        return begun.written(keys[:, rest], values[:, rest], stamps[rest], threshold, False)

    def capped(self, cap: int) -> "Memory":
        """With no count above `cap`; 0: as it is."""
        if not cap:
            return self
        return replace(self, counts=self.counts.clamp(max=cap))

    def _merged(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        stamps: torch.Tensor,
        slot: torch.Tensor,
        merging: torch.Tensor,
    ) -> "Memory":
        """With those that are `merging`, [Hkv, N], in the slots `slot`, [Hkv, N]: running means."""
        heads, slots = self.counts.shape
        at = (slot + slots * torch.arange(heads, device=slot.device)[:, None]).flatten()
        weight = merging.float()
        added = weight.new_zeros(heads * slots).index_add_(0, at, weight.flatten())
        before = self.counts.flatten().float()
        total = (before + added).clamp(min=1)

        def mean(mine: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
            sums = torch.zeros_like(mine).flatten(0, 1)
            sums.index_add_(0, at, (new * weight[..., None]).flatten(0, 1))
            moved = sums.div_(total[:, None]).add_(mine.flatten(0, 1) * (before / total)[:, None])
            return torch.where((added > 0)[:, None], moved, mine.flatten(0, 1)).view(mine.shape)

        newest = torch.where(merging, stamps, stamps.new_tensor(torch.iinfo(stamps.dtype).min))
        last = self.stamps.flatten().scatter_reduce(0, at, newest.flatten(), "amax")
        return replace(
            self,
            keys=mean(self.keys, keys),
            values=mean(self.values, values),
            counts=(before + added).int().view(heads, slots),
            stamps=last.view(heads, slots),
        )

    def _placed(
        self, keys: torch.Tensor, values: torch.Tensor, stamps: torch.Tensor, new: torch.Tensor
    ) -> "Memory":
        """With those that are `new`, [Hkv, N], in slots of their own: empty ones, then the stalest;
        where there are more than slots, the last stay."""
        slots = self.counts.shape[1]
        rank = new.cumsum(1)  # from 1
        staying = new & (rank > rank[:, -1:] - slots)
        head, token = staying.nonzero(as_tuple=True)
        slot = self.stamps.argsort(1)[head, (rank[head, token] - 1) % slots]
        at = (head, slot)
        return replace(
            self,
            keys=self.keys.index_put(at, keys[head, token]),
            values=self.values.index_put(at, values[head, token]),
            counts=self.counts.index_put(at, self.counts.new_ones(())),
            stamps=self.stamps.index_put(at, stamps[token]),
        )
