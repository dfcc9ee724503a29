"""What a model's predictions lose where a KV head does not look back all the way.

That heads differ in this and that it can be measured once is DuoAttention's observation (arXiv
2410.10819), which learns whether a head has to look back; here it is how far, in no steps. Each
text is read once, in full attention, and read back once. Where a head's output at some position
lacks d, as from a shorter window or without one entry, the predictions move by a KL divergence of
E[(g d)^2] / 2 nats to second order. g is the gradient of the log-likelihood of tokens drawn from
the predictions themselves, so that E[g g^T] is their Fisher information. What is lost by entry is
what the linear predictor is fitted to.
"""

from collections.abc import Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

from ullage.errors import TechniqueError
from ullage.kv.fingerprint import fingerprint
from ullage.specs.blocks import full_layer_numbers
from ullage.specs.families import spec_from_config
from ullage.specs.survivors import SINKS
from ullage.techniques.dms.adapter import WINDOWS, Adapter
from ullage.techniques.dms.gradients import HEAD_TOKENS, LayerInput, differentiable, last_hidden
from ullage.techniques.dms.ridge import Fit

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EVERY_TOKENS = 16  # a position is looked at; all of the second half of a text
ROWS = 32  # positions at once
FAR_TOKENS = 512  # an entry's age when it begins to be missed, in texts that are long


class Losses:
    """What the layers `layers` lose of texts of T tokens each: `sums` [L, Hkv, J] by window, and in
    `fit` by entry, at so many `positions`."""

    def __init__(self, layers: list[int], heads: int, hidden_size: int, tokens: int) -> None:
        self.layers = layers
        self.windows = tuple(size for size in WINDOWS if 2 * size <= tokens)
        self.sums = torch.zeros(len(layers), heads, len(self.windows))
        self.far = min(FAR_TOKENS, tokens // 4)
        self.fit = Fit(len(layers), heads, hidden_size)
        self.positions = 0

    def attention(self, given: LayerInput) -> torch.Tensor:
        """The model's own; on the way back what it loses is noted."""
        output = given.attention()
        if given.layer in self.layers:
            output.register_hook(partial(self._note, given))  # type: ignore[no-untyped-call]
        return output

    def _note(self, given: LayerInput, gradient: torch.Tensor) -> None:
        """By the gradient of the output, [Hq, T, D]."""
        at = self.layers.index(given.layer)
        keys = given.keys.detach()
        missed = keys.new_zeros(keys.shape[:2], dtype=torch.float32)
        for rows in torch.split(_positions(keys.shape[1]).to(keys.device), ROWS):
            weights, moved = _moved(given, gradient, rows)
            self.sums[at] += _by_window(weights, moved, rows, self.windows).cpu() / 2
            missed += _by_entry(weights, moved, rows, self.far)
        self.fit.add(at, given.hidden[: -self.far], missed[:, : -self.far])


def measure(
    model: "PreTrainedModel", texts: Iterable[torch.Tensor], record: dict[str, Any]
) -> Adapter:
    """An adapter for `model`, from `texts`, [T] token ids each, all equally long.

    Raises:
        TechniqueError: the model has no layer that DMS acts on, it caps its attention scores, or
            the texts are shorter than twice the least window.
    """
    spec = spec_from_config(model.config.get_text_config().to_dict())
    layers = full_layer_numbers(spec)
    losses: Losses | None = None
    random = torch.Generator(model.device).manual_seed(0)
    for ids in texts:
        if losses is None:
            losses = Losses(layers, spec.num_kv_heads, spec.hidden_size, len(ids))
            if not losses.windows or not layers:
                raise TechniqueError(f"dms: there is nothing to measure in {len(ids)} tokens.")
        with differentiable(model, losses.attention):
            _read_and_back(model, ids, random)
        losses.positions += len(_positions(len(ids)))
        losses.fit.settle()
    if losses is None:
        raise TechniqueError("dms: there is no text to measure with.")
    return Adapter(
        losses.windows,
        (losses.sums / losses.positions).numpy(),
        losses.fit.captured().numpy(),
        spec.head_dim,
        fingerprint(model),
        record,
        {"linear": losses.fit.weights().numpy()},
    )


def _read_and_back(model: "PreTrainedModel", ids: torch.Tensor, random: torch.Generator) -> None:
    """The gradient of the log-likelihood of tokens drawn from the predictions after `ids`, [T]; the
    logits of some positions at a time."""
    hidden = last_hidden(model, ids)
    leaf = hidden.detach().requires_grad_()
    for part in torch.split(leaf, HEAD_TOKENS):
        logits = model.get_output_embeddings()(part).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
        torch.autograd.backward(F.cross_entropy(logits, drawn, reduction="sum"))
    torch.autograd.backward(hidden, leaf.grad)


def _positions(tokens: int) -> torch.Tensor:
    return torch.arange(tokens // 2, tokens, EVERY_TOKENS)


@torch.no_grad()
def _moved(
    given: LayerInput, gradient: torch.Tensor, rows: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention weights of the queries at `rows`, and these times how far each value moves what is
    said along `gradient`: [Hkv, G, N, T] each in fp32."""
    heads, tokens, width = given.keys.shape
    query, pull = (
        part[:, rows].float().reshape(heads, -1, width) for part in (given.query, gradient)
    )
    scores = (query @ given.keys.float().transpose(1, 2)).mul_(given.scale)
    scores = scores.view(heads, -1, len(rows), tokens)
    later = torch.arange(tokens, device=rows.device) > rows[:, None]
    weights = scores.masked_fill_(later, float("-inf")).softmax(-1)
    pulled = (pull @ given.values.float().transpose(1, 2)).view(weights.shape)
    return weights, pulled.mul_(weights)


def _by_window(
    weights: torch.Tensor, moved: torch.Tensor, rows: torch.Tensor, windows: tuple[int, ...]
) -> torch.Tensor:
    """Sums over queries, [Hkv, J], of (g d)^2 where a head sees one window and the first tokens."""
    behind = rows[:, None] - torch.tensor(windows, device=rows.device)  # [N, J], the last unseen
    place = behind.clamp(min=SINKS - 1).expand(*weights.shape[:2], -1, -1)

    def unseen(numbers: torch.Tensor) -> torch.Tensor:
        summed = numbers.cumsum(-1)
        return summed.gather(-1, place) - summed[..., SINKS - 1 : SINKS]  # [Hkv, G, N, J]

    whole = moved.sum(-1, keepdim=True)
    left = (1 - unseen(weights)).clamp(min=torch.finfo(weights.dtype).tiny)
    lost = (whole - unseen(moved)) / left - whole
    return lost.sum(1).square().sum(1)  # a group moves together


def _by_entry(
    weights: torch.Tensor, moved: torch.Tensor, rows: torch.Tensor, far: int
) -> torch.Tensor:
    """Sums over queries, [Hkv, T], of (g d)^2 where one entry is gone that is at least `far` tokens
    old."""
    lost = (moved - weights * moved.sum(-1, keepdim=True)).sum(1)  # [Hkv, N, T]
    entry = torch.arange(weights.shape[-1], device=rows.device)
    return lost.square_().mul_(rows[:, None] - entry >= far).sum(1)
