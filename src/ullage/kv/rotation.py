"""Rotary positions: what turns queries and keys, and how far."""

import torch


def rotated(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """[H, N, D] turned by the angles of `cos` and `sin`, [N, rot]; the rest of D stays as it is."""
    width = cos.shape[-1]
    turned = states[..., :width]
    half = torch.cat([-turned[..., width // 2 :], turned[..., : width // 2]], dim=-1)
    turned = turned * cos + half * sin
    return torch.cat([turned, states[..., width:]], dim=-1) if width < states.shape[-1] else turned


def normed(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Without the factor by which some models lengthen what they rotate."""
    length = (cos.square() + sin.square()).sqrt()
    return cos / length, sin / length
