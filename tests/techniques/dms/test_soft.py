"""Attention under a soft mask, held to the same written out, and its gradients to autograd's."""

import pytest
import torch

from ullage.techniques.dms import soft
from ullage.techniques.dms.soft import SoftAttention

WINDOWS = torch.tensor([3, 9])
SCALE = 0.3


def written_out(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, keep: torch.Tensor
) -> torch.Tensor:
    tokens = keys.shape[1]
    age = torch.arange(tokens)[:, None] - torch.arange(tokens)
    scores = torch.einsum("hgnd,htd->hgnt", query.view(2, 2, tokens, -1), keys) * SCALE
    scores = scores + ((age >= WINDOWS[:, None, None]) * keep[:, None])[:, None]
    weights = scores.masked_fill(age < 0, float("-inf")).softmax(-1)
    return torch.einsum("hgnt,htd->hgnd", weights, values).reshape(query.shape)


@pytest.mark.parametrize("rows", [1, 5, 100])
def test_both_ways_as_written_out(monkeypatch: pytest.MonkeyPatch, rows: int) -> None:
    monkeypatch.setattr(soft, "ROWS", rows)
    random = torch.Generator().manual_seed(0)
    shapes = (4, 17, 8), (2, 17, 8), (2, 17, 8), (2, 17)
    given = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in shapes]
    given[3] = -given[3].exp()
    for states in given:
        states.requires_grad_()
    output, wanted = SoftAttention.apply(*given, WINDOWS, SCALE), written_out(*given)  # type: ignore[no-untyped-call]
    torch.testing.assert_close(output, wanted)
    pull = torch.randn(output.shape, generator=random, dtype=torch.float64)
    found = torch.autograd.grad(output, given, pull)
    for own, other in zip(found, torch.autograd.grad(wanted, given, pull), strict=True):
        torch.testing.assert_close(own, other)
