"""Expected attention (arXiv 2510.00636): what queries to come will look for, from those so far.

Queries before their rotation are taken as normal over the sequence so far, each number on its own;
a key's worth is the attention that it can expect from them over the next positions. No training.

Left out of the paper's, because SmolLM2-135M's perplexity was better without: the whole covariance
(D times as large), the length of the value as a factor, and shares of attention compared across
heads: each head keeps as many entries as any other.
"""

import torch

from ullage.kv.rotation import normed, rotated
from ullage.kv.rows import NewTokens
from ullage.techniques.dms.overhead import FUTURE_TOKENS, WAITING_TOKENS

_Turned = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]


class ExpectedAttention:
    """A `Scorer`: sums over the queries seen and over their squares, [Hq, D] each in fp32."""

    def __init__(self) -> None:
        self._scale = 1.0
        self._count = 0
        self._sum: torch.Tensor | None = None
        self._squares: torch.Tensor | None = None
        # Queries, cos and sin of tokens that came one by one: many at once cost as much as one.
        self._waiting: tuple[_Turned, ...] = ()
        self._angles: torch.Tensor | None = None  # [rot / 2], a token's turn
        self._cos: torch.Tensor | None = None  # [1, rot], of the newest token
        self._sin: torch.Tensor | None = None

    def see(self, new: NewTokens) -> None:
        self._scale = new.scale
        turned = new.query, new.cos, new.sin
        self._waiting = (*self._waiting, _alone(*turned) if len(new) == 1 else turned)
        if len(new) > 1 or len(self._waiting) == WAITING_TOKENS:
            self._sum_up()

    def _sum_up(self) -> None:
        """Take the queries that wait into the sums."""
        if not self._waiting:
            return
        queries, coses, sines = zip(*self._waiting, strict=True)
        if coses[0] is None and self._cos is not None:
            raise RuntimeError("queries come without their rotation: DMS is not attached any more")
        self._waiting = ()
        query = torch.cat(queries, dim=1).float()  # [Hq, N, D]
        if coses[0] is not None:
            cos, sin = normed(torch.cat(coses), torch.cat(sines))
            query = rotated(query, cos, -sin)
            self._turn(cos, sin)
        sums, squares = query.sum(1), query.square().sum(1)
        self._sum = sums if self._sum is None else self._sum + sums
        self._squares = squares if self._squares is None else self._squares + squares
        self._count += query.shape[1]

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        self._sum_up()
        if self._sum is None or self._squares is None:
            raise RuntimeError("scores are asked for before any token was seen")
        heads, tokens, _ = keys.shape
        mean = self._sum / self._count  # [Hq, D]
        spread = self._squares / self._count - mean.square()  # [Hq, D]
        key = self._as_future_queries_see(keys.float())  # [Hkv, R, D]
        key = key.repeat_interleave(mean.shape[0] // heads, dim=0) * self._scale  # [Hq, R, D]
        # log E exp(q k), [Hq, R]
        expected = (key @ mean[:, :, None] + key.square() @ spread[:, :, None] / 2)[..., 0]
        shares = expected.log_softmax(-1).view(heads, -1, tokens)  # logs: the least are no ties
        return shares.logsumexp(1)  # [Hkv, R]

    def _turn(self, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Remember where the newest token stands, and, from two that follow each other, how far a
        token turns."""
        if self._cos is not None and self._sin is not None:
            cos = torch.cat([self._cos, cos])
            sin = torch.cat([self._sin, sin])
        if self._angles is None and cos.shape[0] > 1:
            half = cos.shape[1] // 2
            (c0, c1), (s0, s1) = cos[:2, :half], sin[:2, :half]
            self._angles = torch.atan2(s1 * c0 - c1 * s0, c1 * c0 + s1 * s0)
        self._cos, self._sin = cos[-1:].clone(), sin[-1:].clone()  # a view would keep them all

    def _as_future_queries_see(self, keys: torch.Tensor) -> torch.Tensor:
        """Keys turned back by the mean rotation of the positions ahead."""
        if self._cos is None or self._sin is None or self._angles is None:
            return keys
        ahead = torch.arange(1, FUTURE_TOKENS + 1, device=keys.device)[:, None] * self._angles
        cos, sin = ahead.cos().mean(0).repeat(2), ahead.sin().mean(0).repeat(2)  # [rot]
        # the angle addition of the mean turn to where the newest token stands
        return rotated(
            keys, self._cos * cos - self._sin * sin, -(self._sin * cos + self._cos * sin)
        )


def _alone(query: torch.Tensor, *angles: torch.Tensor | None) -> _Turned:
    """In memory of their own: views of a chunk's last token would keep all of the chunk."""
    cos, sin = (None if part is None else part.clone() for part in angles)
    return query.clone(), cos, sin
