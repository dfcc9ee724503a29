"""What a row's queries see before all that is its own."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from typing import Any

import torch

from ullage.kv.kernels import Piece

Attend = Callable[[torch.Tensor, list[Piece]], torch.Tensor]  # query and output [Hq, N, D]


@dataclass(frozen=True)
class Before:
    """Entries that all queries of a row see beside its own: the row does not hold them, and they
    are no tokens of its sequence. `note` is for whoever put them there."""

    piece: Piece
    note: Any = None

    def behind(self, attention: Attend) -> Attend:
        """`attention` over these too, by all heads of a query."""

        def seeing(query: torch.Tensor, pieces: list[Piece]) -> torch.Tensor:
            return attention(query, self.joined(pieces, slice(0, len(query))))

        return seeing

    def joined(self, pieces: list[Piece], heads: slice) -> list[Piece]:
        """`pieces` of the query heads `heads`, those of the same heads side by side, as kernels
        want them; in front of them what these heads see of this."""
        joined = []
        for seeing, own in groupby(pieces, attrgetter("heads")):
            joined.append(self.piece if seeing is None else self._seen(seeing, heads))
            joined += own
        return joined

    def _seen(self, seeing: slice, heads: slice) -> Piece:
        """What some of `heads` see."""
        if seeing == heads:
            return replace(self.piece, heads=heads)
        group = (heads.stop - heads.start) // self.piece.keys.shape[0]
        kv_heads = slice(*((at - heads.start) // group for at in (seeing.start, seeing.stop)))
        return replace(self.piece.of_heads(kv_heads), heads=seeing)
