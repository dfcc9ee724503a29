"""Facts that a model knows while they are attached to it: written, edited and forgotten in a
moment, and read by prompts that name their subjects.

    with FactMemory(model, tokenizer) as memory:
        memory.write("The capital of Atlantis is Poseidonia.")
        memory.ask("What is the capital of Atlantis? It is")
        model.generate(**tokenizer("The capital of Atlantis is", return_tensors="pt"))
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from ullage.errors import PromptError, TechniqueError
from ullage.kv.preface import Preface
from ullage.kv.prefaced import prefaced
from ullage.techniques.larimar.adapter import Adapter
from ullage.techniques.larimar.event import START
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.gate import Gate
from ullage.techniques.larimar.latent import Latent
from ullage.techniques.larimar.ledger import Ledger, Who
from ullage.techniques.larimar.readout import KV, Held
from ullage.techniques.larimar.settings import HELD_MIB
from ullage.techniques.tokenizer import shared_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ME = Who("python")


class FactMemory:
    """The facts of a ledger, for a model: use it as a context manager.

    While it is open a prompt in which the subject of a fact stands is read behind that fact's KV
    entries; any other by the model as it is, to the bit. What others write to the ledger counts
    from the next prompt on.
    """

    def __init__(
        self,
        model: "PreTrainedModel",
        tokenizer: "PreTrainedTokenizerBase",
        ledger: Ledger | Path | None = None,
        *,
        who: Who = _ME,
        held_bytes: int = HELD_MIB << 20,
        adapter: Adapter | None = None,
    ) -> None:
        """`ledger`: one that is open, or the file of one, which is begun where there is none;
        None: facts that end with this memory. `held_bytes`: of what is kept of facts at hand:
        latents by an `adapter` of this model, entries without.

        Raises:
            LedgerError: the ledger cannot be opened, or was tampered with.
            TechniqueError: the adapter is of another model.
        """
        self._held: Held[Any] = Held(
            Latent(model, tokenizer, adapter) if adapter else KV(model, tokenizer), held_bytes
        )
        self.model, self.tokenizer, self.who = model, tokenizer, who
        self._closing, self._attached = ExitStack(), ExitStack()
        if not isinstance(ledger, Ledger):
            ledger = Ledger.in_memory() if ledger is None else Ledger(Path(ledger), create=True)
            self._closing.enter_context(ledger)
        self.ledger = ledger
        self._gate, self._facts = Gate(), dict[int, Fact]()
        self._seen, self._chain = 0, START  # the last event, and its hash
        self.refresh()

    def attached(self) -> AbstractContextManager[None]:
        """The model reads the facts inside it, and the memory stays open behind it.

        Raises:
            TechniqueError: another memory is attached, or the model takes no attention but its own.
        """
        return prefaced(self.model, self.recall, "larimar")

    def __enter__(self) -> Self:
        """Raises what `attached` does."""
        try:
            self._attached.enter_context(self.attached())
        except BaseException:
            self._closing.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._attached.close()
        self._closing.close()

    @property
    def facts(self) -> dict[int, Fact]:
        """Those that stand, by number."""
        self.refresh()
        return dict(self._facts)

    @property
    def nbytes(self) -> int:
        """Of what is kept of facts."""
        return self._held.nbytes

    def write(
        self,
        text: str | None = None,
        *,
        subject: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
        reason: str = "",
    ) -> int:
        """Write a fact, from its text or from prompt and answer: its number. One that stands
        already is not written again.

        Raises:
            FactError: it is no fact, or contradicts one that stands.
            LedgerError: the ledger cannot be written.
        """
        fact = Fact.make(text, subject, prompt, answer)
        with self._made(fact):
            return self.ledger.add([fact], self._who(reason)).numbers[0]

    def edit(
        self,
        number: int,
        text: str | None = None,
        *,
        subject: str | None = None,
        answer: str | None = None,
        reason: str = "",
    ) -> None:
        """Put another fact in the place of one: a text, or another answer to its prompt, or the
        same about another subject; raises what `write` does."""
        was = self._fact(number)
        fact = was.edited(text, answer, subject)
        with self._made(fact):
            self.ledger.edit(number, fact, self._who(reason), was)
        self.refresh()

    def forget(self, number: int, *, reason: str = "") -> None:
        """Let a fact stand no longer: nothing of it is left in this memory.

        Raises:
            FactError: no such fact stands.
        """
        self.ledger.forget([number], self._who(reason))
        self.refresh()

    def scope(self, prompt: str) -> int | None:
        """The number of the fact that a prompt is read behind; None if it is none."""
        self.refresh()
        return self._gate.scope(prompt)

    def entries(self, number: int) -> Preface:
        """What is read of a fact.

        Raises:
            FactError: no such fact stands.
        """
        return self._held.of(self._fact(number))

    def recall(self, ids: list[int]) -> Preface | None:
        """What a prompt of these token ids is read behind."""
        number = self.scope(self.tokenizer.decode(ids, skip_special_tokens=True))
        return None if number is None else self._held.of(self._facts[number])

    def ask(self, prompt: str, max_new_tokens: int = 32) -> str:
        """The likeliest text behind `prompt`; the memory is open.

        Raises:
            PromptError: it is empty or only blank.
        """
        if not prompt.strip():
            raise PromptError("The prompt is empty or only blank: there is nothing to go on from.")
        encoded = self.tokenizer(prompt, return_tensors="pt").to(self.model.device)
        ids = self.model.generate(
            input_ids=encoded["input_ids"],
            attention_mask=encoded["attention_mask"],
            max_new_tokens=max_new_tokens,
            do_sample=False,
        )
        new = ids[0, encoded["input_ids"].shape[1] :]
        return str(self.tokenizer.decode(new, skip_special_tokens=True))

    def refresh(self) -> None:
        """Take in what happened in the ledger since the last time.

        Raises:
            LedgerError: it was tampered with.
        """
        for event in self.ledger.events(after=self._seen):
            self.ledger.refuse_changed(event, self._chain)
            self._seen, self._chain = event.number, event.chain_hash
            before, after = self._facts.pop(event.fact, None), event.fact_after
            if before is not None:
                self._gate.forget(event.fact)
                self._held.drop(before)
            if after is not None:
                self._gate.write(event.fact, after)
                self._facts[event.fact] = after

    def _fact(self, number: int) -> Fact:
        """One that stands, as it was when its event was gone through."""
        self.refresh()
        return self._facts.get(number) or self.ledger.fact(number)  # which says why there is none

    @contextmanager
    def _made(self, fact: Fact) -> Iterator[None]:
        """With its entries: what cannot be read is not written, and what is not written is gone."""
        self._held.hold(fact)
        try:
            yield
        except BaseException:
            self._held.drop(fact)
            raise

    def _who(self, reason: str) -> Who:
        return Who(self.who.actor, reason or self.who.reason)


def tokenizer_of(model: "PreTrainedModel", folder: str = "") -> "PreTrainedTokenizerBase":
    """The tokenizer in `folder`, or where the model was read from; never code of that folder.

    Raises:
        TechniqueError: there is none.
    """
    where = folder or model.config._name_or_path
    try:
        if not where:
            raise ValueError("it was read from no folder")
        return shared_tokenizer(where)
    except (OSError, ValueError, KeyError) as error:
        raise TechniqueError(
            "larimar: no tokenizer of this model can be read: name its folder with tokenizer=."
        ) from error
