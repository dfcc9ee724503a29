"""The paper's learned predictor (arXiv 2506.05345, section 3): trained to predict what the model
with all its entries predicts, while ever fewer of them are kept.

A KV head reads off a token's hidden state h whether its entry goes, a = sigmoid((b - w h + g) / t),
g the difference of two Gumbel noises and t a temperature. Once the entry is beyond the window,
log(1 - a) is added to its scores. The loss is the KL divergence to the dense model, and how far the
mean of a falls short of what is asked for, which rises with the steps. Heads whose window is as
long as the text do not count: to let go of what never leaves would be free. The model's own weights
stay as they are.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn import functional as F

from ullage.specs.survivors import SINKS
from ullage.techniques.dms.gradients import (
    HEAD_TOKENS,
    LayerInput,
    differentiable,
    last_hidden,
)
from ullage.techniques.dms.soft import SoftAttention

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TEMPERATURE = 0.3
BIAS = -5.0  # below what the mean entry is worth: at first all stays
CLIMB = 12.0  # that the bias can rise by in all steps together
RATE = 0.03  # of a step: of the mean size of a head's weights
RISE = 0.8  # of the steps, until all that is asked for has to go


@dataclass(frozen=True)
class Course:
    """`steps`, of a text each, until `evicted`, a share, goes of what is beyond the windows: those
    of each of the layers `layers`, [L][Hkv] in tokens."""

    layers: list[int]
    windows: tuple[tuple[int, ...], ...]
    evicted: float
    steps: int

    def asked(self, step: int) -> float:
        """The share that has to go at a step."""
        return self.evicted * min(1.0, (step + 1) / (RISE * self.steps))


@dataclass(frozen=True)
class Point:
    """A step: the KL divergence to the dense model, in nats a token, and the share that stayed in
    the heads whose windows are shorter than the text."""

    divergence: float
    kept: float


class Trainer:
    """Trains `weights`, [L, Hkv, E], from which it starts, and a bias for each head, [L, Hkv]."""

    def __init__(self, model: "PreTrainedModel", course: Course, weights: torch.Tensor) -> None:
        self.model, self.course = model, course
        device = model.device
        self.weights = torch.nn.Parameter(weights.to(device, torch.float32, copy=True))
        self.bias = torch.nn.Parameter(self.weights.new_full(weights.shape[:2], BIAS))
        rate, bias_rate = RATE * float(weights.abs().mean()), CLIMB / course.steps
        self._adam = torch.optim.Adam(
            [{"params": [self.weights], "lr": rate}, {"params": [self.bias], "lr": bias_rate}]
        )
        self.history: list[Point] = []
        self._windows = torch.tensor(course.windows, device=device)
        self._noise: torch.Tensor | None = None  # [L, Hkv, T]; None: all is kept
        self._gone: dict[int, torch.Tensor] = {}  # the mean of a, [Hkv], by layer

    def state(self) -> dict[str, torch.Tensor]:
        """All that going on takes."""
        state = {"weights": self.weights.data, "bias": self.bias.data}
        for name, parameter in (("weights", self.weights), ("bias", self.bias)):
            for key, value in self._adam.state[parameter].items():
                state[f"{name}.{key}"] = value
        points = [(point.divergence, point.kept) for point in self.history]
        return state | {"history": torch.tensor(points, dtype=torch.float64).view(-1, 2)}

    def go_on(self, state: dict[str, torch.Tensor]) -> None:
        """From a `state` of a trainer of the same course."""
        for name, parameter in (("weights", self.weights), ("bias", self.bias)):
            parameter.data.copy_(state[name])
            self._adam.state[parameter] = {
                "step": state[f"{name}.step"].clone(),  # which Adam keeps on the host
                **{
                    key: state[f"{name}.{key}"].to(parameter.device, copy=True)
                    for key in ("exp_avg", "exp_avg_sq")
                },
            }
        self.history = [Point(*pair) for pair in state["history"].tolist()]

    def step(self, ids: torch.Tensor) -> Point:
        """One step on a text, [T] token ids, longer than the least window."""
        number = len(self.history)
        counted = self._windows < len(ids)
        with differentiable(self.model, self._attention):
            with torch.no_grad():
                dense = last_hidden(self.model, ids)
            self._noise = self._drawn(number, len(ids))
            try:
                hidden = last_hidden(self.model, ids)
                divergence, gradient = self._divergence(dense, hidden)
                gone = torch.stack([self._gone[at] for at in range(len(self.bias))])[counted].mean()
                short = F.relu(self.course.asked(number) - gone)
                self._adam.zero_grad()
                torch.autograd.backward([hidden, short], [gradient, None])
            finally:
                self._noise = None
        self._adam.step()
        self.history.append(Point(divergence, 1 - float(gone.detach())))
        return self.history[-1]

    def _divergence(self, dense: torch.Tensor, hidden: torch.Tensor) -> tuple[float, torch.Tensor]:
        """KL divergence of the predictions from `hidden` to those from `dense`, [T, E] each, a
        token on average, and its gradient; the logits of some tokens at a time."""
        leaf, total = hidden.detach().requires_grad_(), 0.0
        head = self.model.get_output_embeddings()
        for own, other in zip(
            torch.split(leaf, HEAD_TOKENS), torch.split(dense, HEAD_TOKENS), strict=True
        ):
            said = head(own).float().log_softmax(-1)
            wanted = head(other).float().log_softmax(-1).detach()
            part = F.kl_div(said, wanted, reduction="sum", log_target=True) / len(leaf)
            torch.autograd.backward(part)
            total += float(part.detach())
        assert leaf.grad is not None
        return total, leaf.grad

    def _drawn(self, step: int, tokens: int) -> torch.Tensor:
        """Noise of a step, [L, Hkv, T]: the same whenever it is drawn."""
        random = torch.Generator().manual_seed(step)
        even = torch.rand(*self.bias.shape, tokens, generator=random).clamp_(1e-6, 1 - 1e-6)
        return even.logit().to(self.model.device)  # of two Gumbel noises the difference

    def _attention(self, given: LayerInput) -> torch.Tensor:
        """[Hq, T, D], dense or as far as the heads keep."""
        if self._noise is None or given.layer not in self.course.layers:
            return given.attention()
        at = self.course.layers.index(given.layer)
        hidden = given.hidden.float()
        worth = self.weights[at] @ (hidden - hidden.mean(0)).T  # [Hkv, T]
        logits = (self.bias[at][:, None] - worth + self._noise[at])[:, SINKS:] / TEMPERATURE
        self._gone[at] = torch.sigmoid(logits).mean(1)
        left = F.pad(F.logsigmoid(-logits), (SINKS, 0))
        states = given.query, given.keys, given.values
        return SoftAttention.apply(*states, left, self._windows[at], given.scale)  # type: ignore[no-any-return, no-untyped-call]
