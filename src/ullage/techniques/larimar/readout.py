"""The training-free readout: a fact's own KV entries, made when it is written or first read, and
seen by whatever sequence asks for it. The paper trains one entry a layer in their place.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING

from ullage.errors import TechniqueError
from ullage.kv.preface import Preface, read_before
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.settings import MOST_ENTRIES, MOST_TOKENS, READ_TOKENS
from ullage.techniques.larimar.subject import stands_in
from ullage.techniques.larimar.wording import LEADS, WRITTEN_BIAS, Wording

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BESIDE = 8  # tokens around an answer's, which are no more than its bytes: where its words end


def made(model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", fact: Fact) -> Preface:
    """The entries of a fact: a forward pass or a few, of `READ_TOKENS` each. Of a fact of more
    tokens than are kept, which few of `LIMIT_CHARACTERS` have, these are the first.

    Raises:
        TechniqueError: the tokenizer does not say where its tokens stand.
    """
    if not tokenizer.is_fast:
        raise TechniqueError("larimar: this tokenizer does not say where its tokens stand.")
    for leads in range(len(LEADS), -1, -1):
        wording = Wording.of(fact, LEADS[:leads])
        encoded = tokenizer(wording.text, return_offsets_mapping=True)
        ids, kept = encoded["input_ids"], wording.kept(encoded["offset_mapping"])
        if len(ids) <= MOST_TOKENS and len(kept) <= MOST_ENTRIES:
            break
    kept = dict(islice(kept.items(), MOST_ENTRIES))
    end = max(MOST_TOKENS, 1 + max(kept, default=0))
    start = end - MOST_TOKENS
    places = [place - start for place in kept]
    preface = read_before(model, ids[start:end], places, list(kept.values()), READ_TOKENS)
    said, said_in = partial(_said, tokenizer, fact.answer), len(fact.answer.encode()) + _BESIDE
    return replace(preface, said=said, written_bias=WRITTEN_BIAS, said_in=said_in)


def _said(tokenizer: "PreTrainedTokenizerBase", answer: str, ids: list[int]) -> bool:
    """Whether the answer, if there is one, stands in what was written."""
    return bool(answer) and stands_in(answer, tokenizer.decode(ids))


class Held:
    """Entries of facts by what they say, `most_bytes` at most: those that were read longest ago go
    first, and are made again when they are asked for."""

    def __init__(self, make: Callable[[Fact], Preface], most_bytes: int) -> None:
        self._make, self._most_bytes = make, most_bytes
        self._held: OrderedDict[Fact, Preface] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, fact: Fact) -> bool:
        return fact in self._held

    def of(self, fact: Fact) -> Preface:
        """The entries of a fact; raises what `made` does."""
        if fact in self._held:
            self._held.move_to_end(fact)
            return self._held[fact]
        preface = self._make(fact)
        while self._held and self.nbytes + preface.nbytes > self._most_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes
        if preface.nbytes <= self._most_bytes:
            self._held[fact] = preface
            self.nbytes += preface.nbytes
        return preface

    def drop(self, fact: Fact) -> None:
        """Nothing of it is left here."""
        preface = self._held.pop(fact, None)
        self.nbytes -= 0 if preface is None else preface.nbytes
