"""A learned predictor: how much an entry is worth is read off the hidden state that it was computed
from (arXiv 2506.05345, section 3.1, with a neuron of its own for each KV head)."""

from collections.abc import Callable

import torch

from ullage.kv.rows import NewTokens


class Learned:
    """A `Scorer`: the product of hidden states with `weights_on` their device, [Hkv, E] in fp32,
    kept until the entries are decided on. Sequences share the weights."""

    def __init__(self, weights_on: Callable[[torch.device], torch.Tensor]) -> None:
        self._weights_on = weights_on
        self._worth: tuple[torch.Tensor, ...] = ()  # [Hkv, N] each, of what is undecided

    def see(self, new: NewTokens) -> None:
        if new.hidden is None:
            raise RuntimeError("a learned predictor is told of no hidden states")
        weights = self._weights_on(new.hidden.device)
        self._worth = (*self._worth, weights @ new.hidden.to(weights.dtype).T)

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        worth = torch.cat(self._worth, dim=1)
        self._worth = (worth[:, keys.shape[1] :].clone(),)  # a view would keep all
        return worth[:, : keys.shape[1]]
