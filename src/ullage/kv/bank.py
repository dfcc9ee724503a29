"""Bank: slots of a row as a memory of tokens that left the exact ones.

Keys are those before their rotation, so that tokens of unlike positions can be likened and
averaged; by their age they are turned to ranks where they are read.
"""

from copy import copy
from dataclasses import replace

import torch

from ullage.kv.entries import Entries, side_by_side, stored
from ullage.kv.kernels import Piece
from ullage.kv.memory import Directions, Memory
from ullage.kv.rotation import Angles, rotated
from ullage.kv.slots import Slots
from ullage.kv.state import State, held, packed
from ullage.specs.consolidation import Consolidation

_EMPTY = -(1 << 30)  # an empty slot's stamp, and its number
HIDDEN = torch.finfo(torch.float32).min / 2  # a score's bias


class Bank:
    """The slots of one row from `first` on, as a memory. State beside them is replaced, never
    changed in place."""

    def __init__(self, slots: Slots, first: int, rules: Consolidation) -> None:
        self.slots, self.first, self.rules = slots, first, rules
        self.size = 0  # slots that some head may have used
        self.filled = 0  # the first of them, that some head has used
        self.used = 0.0  # by a head, the mean
        self.counts = self.stamps = torch.empty(0)  # [Hkv, size] int32, as in a `Memory`
        self.bias: torch.Tensor | None = None  # [Hkv, 1, filled], where not all weigh the same
        self.turned: Entries | None = None  # the keys where they are read, if not in their slots
        self._laid: list[Piece] | None = None  # what is read in this segment
        self._directions: Directions | None = None  # once slots are retrieved, in this segment

    def memory(self) -> Memory:
        """What is in it, widened."""
        keys, values = side_by_side(self._slots(self.size), torch.float32)
        return Memory(keys, values, self.counts, self.stamps, self.rules.centred)

    def _slots(self, count: int) -> list[Piece]:
        """The first ones, as they are."""
        return self.slots.read(self.first, self.first + count)

    def write(
        self, keys: torch.Tensor, values: torch.Tensor, stamps: torch.Tensor, size: int
    ) -> None:
        """Take tokens in, keys before their rotation and values [Hkv, N, D] in fp32; there are
        `size` slots now."""
        empty = self.size == 0
        self._grow(size, keys)
        before = self.memory()
        now = before.written(keys, values, stamps, self.rules.threshold, empty)
        now = now.capped(self.rules.count_cap)
        head, slot = (now.stamps != before.stamps).nonzero(as_tuple=True)
        changed = stored(now.keys[head, slot, None], now.values[head, slot, None], self._dtype)
        self.slots.put(head, self.first + slot, changed)
        self.counts, self.stamps = now.counts, now.stamps
        self.turned = self._laid = self._directions = None
        self._weigh()

    def nearest(self, keys: torch.Tensor) -> torch.Tensor:
        """Bool [Hkv, N, size]: the `top_k` slots that are likest to each of `keys`, [Hkv, N, D] in
        fp32, before their rotation."""
        if self._directions is None:
            self._directions = self.memory().directions()
        return self._directions.nearest(keys, self.rules.top_k)

    @property
    def beside_bytes(self) -> int:
        """What is kept beside the slots."""
        beside = [self.counts, self.stamps, self.bias]
        if self.turned is not None:
            beside += [self.turned.keys, self.turned.key_scales]
        nbytes: int = sum(tensor.nbytes for tensor in beside if tensor is not None)
        return nbytes + (self._directions.nbytes if self._directions else 0)

    @property
    def _dtype(self) -> torch.dtype:
        return self.slots.pool.dtype

    def _grow(self, size: int, like: torch.Tensor) -> None:
        """Empty slots up to `size`, zeros in them: what nobody sees must yet be a number."""
        more = size - self.size
        if not more:
            return
        heads, _, head_dim = like.shape
        zeros = like.new_zeros(heads, more, head_dim)
        self.slots.write(self.first + self.size, stored(zeros, zeros, self._dtype))
        stamps = _EMPTY + torch.arange(self.size, size, device=like.device, dtype=torch.int32)
        stamps = stamps.expand(heads, -1)
        counts = torch.zeros_like(stamps)
        self.counts = torch.cat([self.counts, counts], 1) if self.size else counts
        self.stamps = torch.cat([self.stamps, stamps], 1) if self.size else stamps
        self.size = size

    def _weigh(self) -> None:
        used = (self.stamps >= 0).sum(1).tolist()  # of each head the first, as empty ones go
        self.filled, self.used = max(used), sum(used) / len(used)
        self.bias = None
        if self.rules.count_bias or self.used < self.filled:
            counts = self.counts[:, : self.filled]
            weight = counts.float().log() if self.rules.count_bias else 0.0 * counts
            self.bias = torch.where(self.stamps[:, : self.filled] >= 0, weight, HIDDEN)[:, None]

    def pieces(self, query: torch.Tensor, angles: Angles, bias: torch.Tensor | None) -> list[Piece]:
        """All slots that are filled, as `query`, [Hq, N, D], reads them under `bias`,
        [Hkv, N, filled], or its own. At compact positions `angles` turn each as far back as its
        rank by age."""
        if self.rules.positions == "compact" and self.turned is None:
            self.turned, self._laid = self._turned(angles), None
        if self._laid is None:
            self._laid = self._laid_out()
        if bias is None:
            return [replace(piece, query=query) for piece in self._laid]
        biases = torch.split(bias, [len(piece) for piece in self._laid], dim=-1)
        together = zip(self._laid, biases, strict=True)
        return [replace(piece, query=query, bias=own) for piece, own in together]

    def _laid_out(self) -> list[Piece]:
        """All slots that are filled, as they are read until something changes."""
        pieces, at = [], 0
        for piece in self._slots(self.filled):
            span = slice(at, at + len(piece))
            if self.turned is not None:
                keys = self.turned.part(span)
                piece = replace(piece, keys=keys.keys, key_scales=keys.key_scales)
            pieces.append(replace(piece, bias=None if self.bias is None else self.bias[..., span]))
            at = span.stop
        return pieces

    def _turned(self, angles: Angles) -> Entries:
        """The keys at their ranks by age, in the pool's format, until they or `angles` change: the
        slots keep them as they are, so that no rounding adds up."""
        pieces, stamps = self._slots(self.filled), self.stamps[:, : self.filled]
        keys, _ = side_by_side(pieces, torch.float32)
        ranks = stamps.argsort(1, descending=True).argsort(1)  # 0: the newest
        cos, sin = angles.turn(-1.0 - torch.arange(self.filled, device=ranks.device))
        keys = rotated(keys, cos[ranks], sin[ranks])
        made = stored(keys, keys, self._dtype)
        return Entries(made.keys, made.keys, made.key_scales, made.key_scales)

    def state(self) -> State:
        """The slots as they are, and what is known of each."""
        if not self.size:
            return {}
        state = packed("bank", self.slots.read(self.first, self.first + self.size))
        return {**state, "bank.counts": self.counts, "bank.stamps": self.stamps}

    def restore(self, state: State, size: int) -> None:
        """What `state` gave of `size` slots; raises what `held` does."""
        if not size:
            return
        self.slots.restore(self.first, state, "bank", size)
        device = self.slots.segments[0].entries.keys.device
        shape = (self.slots.num_kv_heads, size)
        self.counts = held(state, "bank.counts", torch.int32, shape).to(device)
        self.stamps = held(state, "bank.stamps", torch.int32, shape).to(device)
        self.size = size
        self._weigh()

    def copy(self, slots: Slots) -> "Bank":
        """The same in other slots."""
        twin = copy(self)
        twin.slots, twin._laid = slots, None
        return twin
