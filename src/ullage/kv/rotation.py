"""Rotary positions: what turns queries and keys, and how far.

The angles are learned from the tokens that come by, as attention is handed their cosines and sines
and nothing else: a model's way of scaling them is of no matter here.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from math import pi
from typing import Any

import torch

from ullage.kv.attention import attention_modules
from ullage.kv.state import State, held

_LAST = 512  # position up to which a token's turn is measured ever more exactly
Turn = tuple[torch.Tensor, torch.Tensor]  # cos and sin, [N, rot] each


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[..., N, D] turned by the angles of `cos` and `sin`, [N, rot] or with as many axes; the rest
    of D stays as it is."""
    width = cos.shape[-1]
    turned = states[..., :width]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    turned = turned * cos + half * sin
    return torch.cat([turned, states[..., width:]], dim=-1) if width < states.shape[-1] else turned


def normed(cos: torch.Tensor, sin: torch.Tensor) -> Turn:
    """In fp32, without the factor by which some models lengthen what they rotate."""
    cos, sin = cos.float(), sin.float()
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length


@contextmanager
def turns_of(model: torch.nn.Module) -> Iterator[dict[int, list[Turn]]]:
    """Of each layer, by number, what turned the tokens of each forward pass in here: of the first
    sequence of a batch. Layers that turn alike share tensors."""
    turns: dict[int, list[Turn]] = {}

    def see(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cos, sin = kwargs["position_embeddings"]
        turns.setdefault(module.layer_idx, []).append((cos[0], sin[0]))  # type: ignore[arg-type]

    with ExitStack() as undo:
        for _, module in attention_modules(model):
            undo.callback(module.register_forward_pre_hook(see, with_kwargs=True).remove)
        yield turns


class Angles:
    """How far one position turns, in each of the rot / 2 planes. Of one sequence: its first token
    tells where it begins, and those at powers of two, measured modulo a whole turn, tell the angle
    twice as exactly each. Its state is replaced, never changed in place."""

    def __init__(self) -> None:
        self._first: torch.Tensor | None = None  # [rot / 2], the first token's angle
        self._step: torch.Tensor | None = None  # [rot / 2], from one position to the next
        self._next = 1  # the position that is measured next

    def see(self, position: int, cos: torch.Tensor, sin: torch.Tensor) -> bool:
        """Those of the tokens from `position` on, [N, rot] each; whether more is known for it."""
        before = self._next
        if position == 0:
            self._first = _angle(cos[0], sin[0])
        while self._next <= _LAST and position <= self._next < position + len(cos):
            self._measure(_angle(cos[self._next - position], sin[self._next - position]))
        return self._next > before

    def _measure(self, angle: torch.Tensor) -> None:
        turn = angle - (0 if self._first is None else self._first)
        about = torch.zeros_like(turn) if self._step is None else self._step * self._next
        self._step = (about + torch.remainder(turn - about + pi, 2 * pi) - pi) / self._next
        self._next *= 2

    @property
    def exactness(self) -> int:
        """Grows as what it knows becomes more exact."""
        return self._next

    @property
    def nbytes(self) -> int:
        """What it remembers."""
        return sum(part.nbytes for part in (self._first, self._step) if part is not None)

    def state(self) -> State:
        """All that it remembers."""
        known = {"angles.first": self._first, "angles.step": self._step}
        return {name: angles for name, angles in known.items() if angles is not None}

    def restore(self, state: State, tokens: int, device: torch.device) -> None:
        """What `state` gave after `tokens` tokens; raises what `held` does."""
        shape = state["angles.first"].shape[:1] if "angles.first" in state else ()
        self._first = held(state, "angles.first", torch.float32, shape).to(device)
        if tokens > 1:
            self._step = held(state, "angles.step", torch.float32, shape).to(device)
        while self._next < tokens and self._next <= _LAST:
            self._next *= 2

    def turn(self, positions: torch.Tensor, behind_first: Sequence[bool] = ()) -> Turn:
        """What turns by so many positions, [...], in fp32: [..., rot] each. `behind_first`, for
        each of the first axis: to where the token stands that is so many behind the first.

        Raises:
            RuntimeError: fewer than two tokens were seen.
        """
        if self._step is None:
            raise RuntimeError("angles are asked for before two tokens were seen")
        angle = positions[..., None] * self._step
        for at, wanted in enumerate(behind_first):
            if wanted and self._first is not None:
                angle[at] += self._first
        return _both_halves(angle.cos()), _both_halves(angle.sin())


def after(first: Turn, then: Turn) -> Turn:
    """One turn and then another."""
    (cos, sin), (more_cos, more_sin) = first, then
    return cos * more_cos - sin * more_sin, sin * more_cos + cos * more_sin


def _angle(cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = cos.shape[-1] // 2
    return torch.atan2(sin[..., :half].float(), cos[..., :half].float())


def _both_halves(numbers: torch.Tensor) -> torch.Tensor:
    return torch.cat([numbers, numbers], dim=-1)
