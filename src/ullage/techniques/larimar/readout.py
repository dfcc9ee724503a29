"""The training-free readout: a fact's own KV entries, made when it is written or first read, and
seen by whatever sequence asks for it. `latent` keeps less of them.
"""

from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

from ullage.errors import TechniqueError
from ullage.kv.preface import Preface, read_before
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.settings import MOST_ENTRIES, MOST_TOKENS, READ_TOKENS
from ullage.techniques.larimar.subject import stands_in
from ullage.techniques.larimar.wording import LEADS, WRITTEN_BIAS, Wording

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_BESIDE = 8  # tokens around an answer's, which are no more than its bytes: where its words end


@dataclass(frozen=True)
class Text:
    """What a model reads of a fact: token ids, and of those that are kept the places and what is
    added to the scores of their entries."""

    ids: list[int]
    places: list[int]
    bias: list[float]


class KV:
    """Makes of facts the entries that are kept of them."""

    def __init__(self, model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase") -> None:
        self.model, self._tokenizer = model, tokenizer

    def make(self, fact: Fact) -> Preface:
        """The entries of a fact: a forward pass or a few, of `READ_TOKENS` each.

        Raises:
            TechniqueError: the tokenizer does not say where its tokens stand.
        """
        return self.entries(fact, self.text(fact))

    def read(self, kept: Preface) -> Preface:
        """They are read as they are."""
        return kept

    def text(self, fact: Fact) -> Text:
        """Raises what `make` does. Of a fact of more tokens than are kept, which few of
        `LIMIT_CHARACTERS` have, the first are."""
        if not self._tokenizer.is_fast:
            raise TechniqueError("larimar: this tokenizer does not say where its tokens stand.")
        for leads in range(len(LEADS), -1, -1):
            wording = Wording.of(fact, LEADS[:leads])
            encoded = self._tokenizer(wording.text, return_offsets_mapping=True)
            ids, kept = encoded["input_ids"], wording.kept(encoded["offset_mapping"])
            if len(ids) <= MOST_TOKENS and len(kept) <= MOST_ENTRIES:
                break
        kept = dict(islice(kept.items(), MOST_ENTRIES))
        end = max(MOST_TOKENS, 1 + max(kept, default=0))
        start = end - MOST_TOKENS
        return Text(ids[start:end], [place - start for place in kept], list(kept.values()))

    def entries(self, fact: Fact, text: Text) -> Preface:
        """Of its text."""
        preface = read_before(self.model, text.ids, text.places, text.bias, READ_TOKENS)
        said = partial(_said, self._tokenizer, fact.answer)
        said_in = len(fact.answer.encode()) + _BESIDE
        return replace(preface, said=said, written_bias=WRITTEN_BIAS, said_in=said_in)


def _said(tokenizer: "PreTrainedTokenizerBase", answer: str, ids: list[int]) -> bool:
    """Whether the answer, if there is one, stands in what was written."""
    return bool(answer) and stands_in(answer, tokenizer.decode(ids))


class Kept(Protocol):
    """What is kept of a fact."""

    @property
    def nbytes(self) -> int: ...


KeptT = TypeVar("KeptT", bound=Kept)


class Readout(Protocol[KeptT]):
    """Makes of facts what is kept of them, and of that what is read."""

    def make(self, fact: Fact) -> KeptT: ...

    def read(self, kept: KeptT) -> Preface: ...


class Held(Generic[KeptT]):
    """What is kept of facts, by what they say, `most_bytes` at most: those that were read longest
    ago go first, and are made again when they are asked for."""

    def __init__(self, readout: Readout[KeptT], most_bytes: int) -> None:
        self._readout, self._most_bytes = readout, most_bytes
        self._held: OrderedDict[Fact, KeptT] = OrderedDict()
        self.nbytes = 0

    def __contains__(self, fact: Fact) -> bool:
        return fact in self._held

    def hold(self, fact: Fact) -> KeptT:
        """What is kept of a fact; raises what the readout's `make` does."""
        if fact in self._held:
            self._held.move_to_end(fact)
            return self._held[fact]
        kept = self._readout.make(fact)
        while self._held and self.nbytes + kept.nbytes > self._most_bytes:
            self.nbytes -= self._held.popitem(last=False)[1].nbytes
        if kept.nbytes <= self._most_bytes:
            self._held[fact] = kept
            self.nbytes += kept.nbytes
        return kept

    def of(self, fact: Fact) -> Preface:
        """What is read of a fact; raises what `hold` does."""
        return self._readout.read(self.hold(fact))

    def drop(self, fact: Fact) -> None:
        """Nothing of it is left here."""
        kept = self._held.pop(fact, None)
        self.nbytes -= 0 if kept is None else kept.nbytes
