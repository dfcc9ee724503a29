"""The trained readout: of each of a fact's KV entries a latent is kept, of which all layers' keys
and values are made when it is read (W_M of arXiv 2403.11901, section 3).

A latent is what an entry's keys, without their rotary position, and values have on the adapter's
basis. The entries are read at the positions just before 0, next to each other, wherever they stood
in the text that they were made of.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ullage.errors import TechniqueError
from ullage.kv.fingerprint import fingerprint
from ullage.kv.kernels import Piece
from ullage.kv.preface import Preface
from ullage.kv.rotation import Turn, normed, rotated, turns_of
from ullage.techniques.larimar.adapter import Adapter
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.readout import KV

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Basis:
    """Between entries, [..., 2, L, Hkv, D] in fp32, and latents, [..., C]: `rows`, [C, 2·L·Hkv·D],
    may be trained."""

    def __init__(self, mean: torch.Tensor, scale: torch.Tensor, rows: torch.Tensor) -> None:
        """`mean`: [2, L, Hkv, D]; `scale`: [2, L]."""
        self.mean, self.scale, self.rows = mean, scale[..., None, None], rows

    @classmethod
    def of(cls, adapter: Adapter, device: torch.device) -> "Basis":
        """That of an adapter, in fp32."""
        mean, scale, rows = (
            torch.from_numpy(numbers).to(device, torch.float32)
            for numbers in (adapter.mean, adapter.scale, adapter.basis)
        )
        return cls(mean, scale, rows.flatten(1))

    def adapter(self, fingerprint: str, record: dict[str, Any]) -> Adapter:
        """An adapter for the model of that fingerprint, with how it was trained."""
        mean, scale, rows = (
            numbers.detach().cpu().numpy() for numbers in (self.mean, self.scale, self.rows)
        )
        basis = rows.reshape(-1, *mean.shape)
        return Adapter(mean, scale[..., 0, 0], basis, fingerprint, record)

    def latents(self, entries: torch.Tensor) -> torch.Tensor:
        """[..., C], of [..., 2, L, Hkv, D]."""
        return self.centred(entries) @ self.rows.T

    def entries(self, latents: torch.Tensor) -> torch.Tensor:
        """[..., 2, L, Hkv, D], of [..., C]."""
        flat = latents @ self.rows
        return flat.view(*latents.shape[:-1], *self.mean.shape) * self.scale + self.mean

    def centred(self, entries: torch.Tensor) -> torch.Tensor:
        """Every layer's as large as the others': [..., 2·L·Hkv·D]."""
        return ((entries - self.mean) / self.scale).flatten(-4)


@dataclass(frozen=True)
class Latents:
    """What is kept of a fact: `numbers`, [T, C] in fp16, and what is added to the scores of each
    entry, `bias`, [T]. `preface` has how it is read, but no entries."""

    numbers: torch.Tensor
    bias: torch.Tensor
    preface: Preface

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.numbers.nbytes + self.bias.nbytes


class Latent:
    """Makes of facts the latents that are kept of them, and of latents what is read."""

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        adapter: Adapter,
    ) -> None:
        """
        Raises:
            TechniqueError: the adapter is of another model.
        """
        if fingerprint(model) != adapter.fingerprint:
            raise TechniqueError(
                "larimar: the adapter is of other weights than this model's: train one by "
                "`ullage train larimar`, or leave readout=latent out."
            )
        self._whole, self._model = KV(model, tokenizer), model
        self._basis = Basis.of(adapter, model.device)
        self._turns: list[Turn] = []  # of each layer, of the last positions before 0: [T, rot]

    def make(self, fact: Fact) -> Latents | Preface:
        """What is kept of a fact; of one whose answer is not known all entries, as the basis is of
        answers. Raises what `KV.make` does."""
        if not fact.answer:
            return self._whole.make(fact)
        entries, preface, turns = unplaced(self._whole, fact)
        self._turns = longer(self._turns, turns)
        numbers = self._basis.latents(entries).to(torch.float16)
        return Latents(numbers, bias_of(preface).clone(), replace(preface, pieces=()))

    def read(self, kept: Latents | Preface) -> Preface:
        """The entries of what is kept."""
        if isinstance(kept, Preface):
            return kept
        entries = self._basis.entries(kept.numbers.float())
        placed = at_the_end(entries, self._turns)
        bias = kept.bias.expand(entries.shape[-2], 1, -1).contiguous()
        dtype = self._model.dtype  # laid out once here, not in each step
        pieces = (
            Piece(keys.to(dtype).contiguous(), values.to(dtype).contiguous(), bias=bias)
            for keys, values in placed
        )
        return replace(kept.preface, pieces=tuple(pieces))


def unplaced(readout: KV, fact: Fact) -> tuple[torch.Tensor, Preface, list[Turn]]:
    """A fact's entries without their positions, [T, 2, L, Hkv, D] in fp32; as they are; and what
    turned each token of the text, as it ends before position 0, in each layer: [N, rot]."""
    text = readout.text(fact)
    with turns_of(readout.model) as seen:
        preface = readout.entries(fact, text)
    turns = _joined([seen[layer] for layer in range(len(preface.pieces))])
    back = [(cos[text.places], -sin[text.places]) for cos, sin in turns]
    keys = torch.stack(
        [
            rotated(piece.keys.float(), *turn)
            for piece, turn in zip(preface.pieces, back, strict=True)
        ]
    )  # [L, Hkv, T, D]
    values = torch.stack([piece.values.float() for piece in preface.pieces])
    return torch.stack([keys, values]).permute(3, 0, 1, 2, 4), preface, turns


def at_the_end(entries: torch.Tensor, turns: list[Turn]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values, [..., Hkv, T, D] each, of each layer, of entries [..., T, 2, L, Hkv, D] at
    the last of the positions that `turns` are of."""
    count = entries.shape[-5]
    keys, values = entries.movedim(-5, -2).unbind(-5)  # [..., L, Hkv, T, D]
    return [
        (rotated(own, cos[-count:], sin[-count:]), other)
        for own, other, (cos, sin) in zip(keys.unbind(-4), values.unbind(-4), turns, strict=True)
    ]


def bias_of(preface: Preface) -> torch.Tensor:
    """What is added to the scores of its entries, [T], alike in all heads."""
    bias = preface.pieces[0].bias
    assert bias is not None
    return bias[0, 0]


def longer(turns: list[Turn], others: list[Turn]) -> list[Turn]:
    """Those of more positions; the first where they are of as many."""
    return max(turns, others, key=lambda of_layers: len(of_layers[0][0]) if of_layers else 0)


def _joined(passes: list[list[Turn]]) -> list[Turn]:
    """What turned all passes' tokens, in fp32; of layers that share tensors it is there once."""
    known: dict[tuple[int, ...], Turn] = {}
    for layer in passes:
        known.setdefault(
            _name(layer), normed(*(torch.cat(part) for part in zip(*layer, strict=True)))
        )
    return [known[_name(layer)] for layer in passes]


def _name(layer: list[Turn]) -> tuple[int, ...]:
    return tuple(cos.data_ptr() for cos, _ in layer)
