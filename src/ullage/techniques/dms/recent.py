"""The baseline: nothing beyond the window is worth anything but the first few tokens."""

import torch

from ullage.kv.rows import NewTokens


class Recent:
    """A `Scorer` to whom all are alike."""

    def see(self, new: NewTokens) -> None:
        """Nothing to learn."""

    def scores(self, keys: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return torch.zeros(keys.shape[:2], device=keys.device)
