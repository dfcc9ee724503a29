"""What the trained readout learns: first the basis on which a model's entries of answers differ the
most, in closed form, and from there, by gradients, one behind whose entries the model answers
(arXiv 2403.11901, section 3.1: the loss of what is read, and of what is reconstructed).

An episode is some facts, each asked for by one of its prompts, behind the entries that are made of
its latents. The loss is the cross-entropy of the answers' tokens, and the share of the entries that
their latents lose. The model's own weights stay as they are.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

import torch
from safetensors.torch import save
from torch.nn import functional as F
from transformers import DynamicCache

from ullage.kv.cache import cache_argument
from ullage.kv.rotation import Turn
from ullage.specs.learned import saved_state
from ullage.specs.whole import write_whole
from ullage.techniques.larimar.asked_facts import AskedFact
from ullage.techniques.larimar.latent import Basis, at_the_end, bias_of, longer, unplaced
from ullage.techniques.larimar.readout import KV
from ullage.techniques.larimar.wording import WRITTEN_BIAS

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

FACTS = 8  # of an episode
SAVED_STEPS = 10
RATE = 2e-3  # of the first step: of the mean size of the basis; it falls to nothing
_MORE = 32  # directions beside those that are kept, so that the last of them are exact, too
_UNSEEN = -1e30  # added to a score


@dataclass(frozen=True)
class Example:
    """A fact: its entries without positions, [T, 2, L, Hkv, D] in fp16, on the host, what is added
    to their scores, [T], and the answer behind each of its questions."""

    entries: torch.Tensor
    bias: torch.Tensor
    asked: "tuple[Asked, ...]"


@dataclass(frozen=True)
class Asked:
    """Token ids of a question and its answer, which begins behind so many of them."""

    ids: list[int]
    begins: int


@dataclass(frozen=True)
class Point:
    """A step: cross-entropy in nats a token of the answers, and the share of entries lost."""

    loss: float
    lost: float


class Examples:
    """Of facts, and what turns the positions before 0 in each layer."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self._readout, self._tokenizer = KV(model, tokenizer), tokenizer
        self.turns: list[Turn] = []  # [T, rot] of each layer

    def of(self, facts: Iterable[AskedFact]) -> Iterator[Example]:
        """An example a fact: a forward pass of the model each."""
        for asked in facts:
            entries, preface, turns = unplaced(self._readout, asked.fact)
            self.turns = longer(self.turns, turns)
            yield Example(
                entries.to("cpu", torch.float16),
                bias_of(preface).cpu(),
                tuple(self._asked(question, asked.fact.answer) for question in asked.questions),
            )

    def _asked(self, question: str, answer: str) -> Asked:
        """As the tokenizer takes them apart together: some begin a text by a blank of their own."""
        encoded = self._tokenizer(f"{question} {answer}", return_offsets_mapping=True)
        ends = [end for _, end in encoded["offset_mapping"]]  # 0 of what is no text: a BOS, an EOS
        own = [at for at, end in enumerate(ends) if end > len(question)]
        return Asked(encoded["input_ids"][: own[-1] + 1], own[0])


def fitted(examples: Sequence[Example], rank: int, device: torch.device) -> Basis:
    """The basis of the first `rank` principal components, or of as many as there are entries or
    numbers in one; every layer's keys and values count alike."""
    entries = torch.cat([example.entries for example in examples]).to(device, torch.float32)
    mean = entries.mean(0)
    entries -= mean
    scale = entries.square().mean((0, 3, 4)).sqrt().clamp_min(torch.finfo(torch.float16).tiny)
    flat = entries.div_(scale[..., None, None]).flatten(1)  # [N, 2·L·Hkv·D]
    width = min(rank + _MORE, *flat.shape)
    with torch.random.fork_rng(devices=[] if device.type == "cpu" else [device]):
        torch.manual_seed(0)
        _, _, components = torch.svd_lowrank(flat, q=width, niter=3)
    return Basis(mean, scale, components[:, :rank].T.contiguous())


class Trainer:
    """Trains the rows of `basis` on `examples`, for so many steps in all."""

    def __init__(
        self,
        model: "PreTrainedModel",
        basis: Basis,
        examples: Sequence[Example],
        turns: list[Turn],
        steps: int,
    ) -> None:
        self.model, self.examples, self.turns, self.steps = model, examples, turns, steps
        self._rows = torch.nn.Parameter(basis.rows.clone())
        self.basis = Basis(basis.mean, basis.scale[..., 0, 0], self._rows)
        self._rate = RATE * float(basis.rows.abs().mean())
        self._adam = torch.optim.Adam([self._rows], lr=self._rate)
        self.history: list[Point] = []

    def state(self) -> dict[str, torch.Tensor]:
        """All that going on takes."""
        points = torch.tensor([(point.loss, point.lost) for point in self.history])
        return {"rows": self._rows.data, "history": points, **self._adam.state[self._rows]}

    def go_on(self, state: dict[str, torch.Tensor]) -> None:
        """From a `state` of a trainer of the same examples."""
        self._rows.data.copy_(state["rows"])
        self._adam.state[self._rows] = {
            "step": state["step"].clone(),  # which Adam keeps on the host
            **{
                key: state[key].to(self._rows.device, copy=True)
                for key in ("exp_avg", "exp_avg_sq")
            },
        }
        self.history = [Point(*pair) for pair in state["history"].tolist()]

    def step(self) -> Point:
        """One step, on the facts that are next."""
        number = len(self.history)
        self._adam.param_groups[0]["lr"] = self._rate * (1 - number / self.steps)
        self._adam.zero_grad()
        with _frozen(self.model):
            loss, lost = self._losses(*_drawn(self.examples, number))
            (loss + lost).backward()  # type: ignore[no-untyped-call]
        self._adam.step()
        self.history.append(Point(float(loss.detach()), float(lost.detach())))
        return self.history[-1]

    def _losses(
        self, examples: Sequence[Example], asked: Sequence[Asked]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The answers' loss behind what is read of the facts, and what that has lost of them."""
        device, count = self._rows.device, max(len(example.bias) for example in examples)
        entries = torch.stack(
            [
                F.pad(example.entries, (0,) * 8 + (count - len(example.entries), 0))
                for example in examples
            ]
        ).to(device, torch.float32)  # [B, T, 2, L, Hkv, D]
        bias = torch.stack(
            [
                F.pad(example.bias, (count - len(example.bias), 0), value=_UNSEEN)
                for example in examples
            ]
        ).to(device)  # [B, T]
        read = self.basis.entries(self.basis.latents(entries))
        off = self.basis.centred(read) - self.basis.centred(entries)
        lost = off[bias > _UNSEEN].square().mean()
        return self._answered(read, bias, asked), lost

    def _answered(
        self, entries: torch.Tensor, bias: torch.Tensor, asked: Sequence[Asked]
    ) -> torch.Tensor:
        """Cross-entropy of the answers' tokens, one on average, behind entries [B, T, 2, L, Hkv, D]
        that are read before the questions, each with a bias, [B, T]."""
        tokens = max(len(text.ids) for text in asked)
        ids = entries.new_zeros(len(asked), tokens, dtype=torch.long)
        said = torch.zeros_like(ids, dtype=torch.bool)
        for row, text in enumerate(asked):
            ids[row, : len(text.ids)] = ids.new_tensor(text.ids)
            said[row, text.begins : len(text.ids)] = True
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(at_the_end(entries, self.turns)):
            cache.update(keys.to(self.model.dtype), values.to(self.model.dtype), layer)
        seen = torch.where(said[..., None], WRITTEN_BIAS * bias[:, None], bias[:, None])
        later = torch.full((tokens, tokens), _UNSEEN, device=ids.device).triu(1)
        mask = torch.cat([seen, later.expand(len(asked), -1, -1)], dim=-1)[:, None]
        logits = self.model(
            input_ids=ids,
            attention_mask=mask.clamp_min(torch.finfo(self.model.dtype).min).to(self.model.dtype),
            position_ids=torch.arange(tokens, device=ids.device).expand(len(asked), -1),
            **cache_argument(self.model, cache),
        ).logits
        wanted = said[:, 1:]
        return F.cross_entropy(logits[:, :-1][wanted].float(), ids[:, 1:][wanted])


@dataclass(frozen=True)
class Saved:
    """The file that a training is saved in every `SAVED_STEPS`, as `training` describes it, and
    what was in it when it began."""

    file: Path
    training: str
    state: dict[str, torch.Tensor] | None

    @classmethod
    def found(cls, file: Path, training: str) -> Self:
        """
        Raises:
            TechniqueError: the file is of another training, or damaged.
        """
        state = saved_state("larimar", file, training) if file.exists() else None
        return cls(file, training, state)


def trained(
    trainer: Trainer,
    saved: Saved,
    watch: Callable[[Point], None],
    resumed: Callable[[int], None],
) -> None:
    """All steps. Goes on from what is `saved`, and tells `resumed` behind how many steps; `watch`
    is told of each step, of earlier ones too, once it is saved if it is to be."""
    if saved.state is not None:
        trainer.go_on(saved.state)
        resumed(len(trainer.history))
        for point in trainer.history:
            watch(point)
    while len(trainer.history) < trainer.steps:
        point = trainer.step()
        if not len(trainer.history) % SAVED_STEPS:
            write_whole(saved.file, save(trainer.state(), {"training": saved.training}))
        watch(point)


def _drawn(examples: Sequence[Example], step: int) -> tuple[list[Example], list[Asked]]:
    """The facts of a step, and how they are asked for: the same whenever they are drawn. All facts
    come by before one does again."""
    facts, asked = [], []
    for number in range(step * FACTS, (step + 1) * FACTS):
        turn, place = divmod(number, len(examples))
        order = random.Random(turn).sample(range(len(examples)), len(examples))
        example = examples[order[place]]
        facts.append(example)
        asked.append(random.Random(number).choice(example.asked))
    return facts, asked


@contextmanager
def _frozen(model: "PreTrainedModel") -> Iterator[None]:
    """No weight of it takes a gradient, and its attention passes them on, whatever it does to
    scores."""
    taking = [weight for weight in model.parameters() if weight.requires_grad]
    before = model.config._attn_implementation
    try:
        model.requires_grad_(False).set_attn_implementation("eager")
        yield
    finally:
        model.set_attn_implementation(before)
        for weight in taking:
            weight.requires_grad_()
