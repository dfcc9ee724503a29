"""The closed form of a predictor: a ridge regression of how much the entries will be missed on the
hidden states that they are computed from.

(KVzap, arXiv 2601.07891, fits attention to come so, too; here it is what the predictions lose.)
Entries compete with those that are decided with them, so both sides are taken less their mean over
each `DECIDED_TOKENS` tokens.
"""

import torch

from ullage.techniques.dms.adapter import DECIDED_TOKENS

RIDGE = 0.01  # of the mean of the diagonal
LEAST = 1e-6  # of the most in a span: what is missed less is all alike


class Fit:
    """Sums over the tokens of texts: `squares` [L, E, E] and `products` [L, E, Hkv], in fp32; and
    `caught`, [L, Hkv, DECIDED_TOKENS], of what is missed in a text, by the rank that the weights
    fitted to the texts before it give its entries among those that they are decided with."""

    def __init__(self, layers: int, heads: int, hidden_size: int) -> None:
        self.squares = torch.zeros(layers, hidden_size, hidden_size)
        self.products = torch.zeros(layers, hidden_size, heads)
        self.caught = torch.zeros(layers, heads, DECIDED_TOKENS)
        self._weights: torch.Tensor | None = None

    def add(self, layer: int, hidden: torch.Tensor, missed: torch.Tensor) -> None:
        """`hidden` [T, E] and `missed` [Hkv, T], the loss where an entry is gone, of one text."""
        spans = hidden.shape[0] // DECIDED_TOKENS
        states = _centred(hidden[: spans * DECIDED_TOKENS].float().T).T  # [T, E]
        loss = missed[:, : spans * DECIDED_TOKENS].view(len(missed), spans, DECIDED_TOKENS)
        if self._weights is not None:
            worth = (self._weights[layer].to(states.device) @ states.T).view(loss.shape)
            ranked = loss.gather(2, worth.argsort(-1, descending=True))
            self.caught[layer] += ranked[:, 1:].sum(1).cpu()  # the first few stay in any case
        floor = loss.amax(-1, keepdim=True).mul(LEAST).clamp(min=torch.finfo(loss.dtype).tiny)
        wanted = _centred(loss.maximum(floor).log().flatten(1))  # [Hkv, T]
        self.squares[layer] += (states.T @ states).cpu()
        self.products[layer] += (wanted @ states).T.cpu()

    def settle(self) -> None:
        """A text is over: what comes is ranked by what is known now."""
        self._weights = self.weights()

    def captured(self) -> torch.Tensor:
        """[L, Hkv, DECIDED_TOKENS], rising to 1: the part of what is missed that the first ranks
        make up; as much as chance has it where no text was ranked."""
        even = torch.arange(1, DECIDED_TOKENS + 1) / DECIDED_TOKENS
        whole = self.caught.sum(-1, keepdim=True)
        summed = self.caught.cumsum(-1) / whole.clamp(min=torch.finfo(whole.dtype).tiny)
        return torch.where(whole > 0, summed.clamp(max=1.0), even)

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
