"""A learned predictor: how much an entry is worth is read off the hidden state that it was computed
from (arXiv 2506.05345, section 3.1, with a neuron of its own for each KV head)."""

import torch

from ullage.kv.rows import NewTokens


class Learned:
    """A `Scorer`: the product of hidden states with `weights`, [Hkv, E] in fp32, kept until the
    entries are decided on."""

    def __init__(self, weights: torch.Tensor) -> None:
        self._weights = weights
        self._worth: tuple[torch.Tensor, ...] = ()  # [Hkv, N] each, of what is undecided

    def see(self, new: NewTokens) -> None:
        if new.hidden is None:
            raise RuntimeError("a learned predictor is told of no hidden states")
        hidden = new.hidden.to(self._weights.dtype)
        worth = (hidden @ self._weights.T.to(hidden.device)).T
        self._worth = (*self._worth, worth)

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        worth = torch.cat(self._worth, dim=1)
        self._worth = (worth[:, keys.shape[1] :],)
        return worth[:, : keys.shape[1]]
