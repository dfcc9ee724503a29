"""The closed form of a predictor: a ridge regression of how much the entries will be missed on the
hidden states that they are computed from.

(KVzap, arXiv 2601.07891, fits attention to come so, too; here it is what the predictions lose.)
Entries compete with those that are decided with them, so both sides are taken less their mean over
each `DECIDED_TOKENS` tokens.
"""

import torch

from ullage.techniques.dms.settings import DECIDED_TOKENS

RIDGE = 0.01  # of the mean of the diagonal
LEAST = 1e-6  # of the most in a span: what is missed less is all alike


class Fit:
    """Sums over the tokens of texts: `squares` [L, E, E] and `products` [L, E, Hkv], in fp32."""

    def __init__(self, layers: int, heads: int, hidden_size: int) -> None:
        self.squares = torch.zeros(layers, hidden_size, hidden_size)
        self.products = torch.zeros(layers, hidden_size, heads)

    def add(self, layer: int, hidden: torch.Tensor, missed: torch.Tensor) -> None:
        """`hidden` [T, E] and `missed` [Hkv, T], the loss where an entry is gone, of one text."""
        spans = hidden.shape[0] // DECIDED_TOKENS
        states = _centred(hidden[: spans * DECIDED_TOKENS].float().T).T  # [T, E]
        loss = missed[:, : spans * DECIDED_TOKENS].view(len(missed), spans, DECIDED_TOKENS)
        floor = loss.amax(-1, keepdim=True).mul(LEAST).clamp(min=torch.finfo(loss.dtype).tiny)
        wanted = _centred(loss.maximum(floor).log().flatten(1))  # [Hkv, T]
        self.squares[layer] += (states.T @ states).cpu()
        self.products[layer] += (wanted @ states).T.cpu()

    def weights(self) -> torch.Tensor:
        """[L, Hkv, E]; their product with a hidden state ranks its entry."""
        squares, products = self.squares.double(), self.products.double()
        ridge = RIDGE * squares.diagonal(dim1=1, dim2=2).mean(-1)  # [L]
        even = torch.eye(squares.shape[1], dtype=torch.float64)
        factor = torch.linalg.cholesky(squares + ridge.clamp(min=1e-6)[:, None, None] * even)
        return torch.cholesky_solve(products, factor).float().transpose(1, 2)


def _centred(numbers: torch.Tensor) -> torch.Tensor:
    """[..., T] less its mean over each span."""
    spans = numbers.reshape(*numbers.shape[:-1], -1, DECIDED_TOKENS)
    return (spans - spans.mean(-1, keepdim=True)).view(numbers.shape)
