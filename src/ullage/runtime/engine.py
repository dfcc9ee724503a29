"""The engine: sequences in and out of a batch, inside the budget.

A sequence is let in when the pool has room for its prompt and all it may write; until then it
waits. Prompts are read one at a time in chunks, sequences that write go together, a token each a
step.

A text that is read once, and many questions that are asked of it, each by itself; a request without
`start` remembers nothing, which is all that a reset is:

    with engine.reading(manual_ids) as manual:
        for question_ids in questions:
            answer = list(engine.generate(Request(question_ids, 50, start=manual)))
    fresh = list(engine.generate(Request(question_ids, 50)))
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from ullage import techniques
from ullage.errors import BudgetExceeded, DoesNotFit, PromptError, UllageError
from ullage.kv.cache import MakeRow, PagedCache, Sequence, Start, cache_argument
from ullage.kv.preface import Preface
from ullage.kv.prefaced import chosen
from ullage.runtime.budget import Budget
from ullage.runtime.load import LoadedModel, device_of
from ullage.runtime.pool import new_pool
from ullage.runtime.request import OnPrefill, Request
from ullage.specs.plan import Plan, Recipe
from ullage.units import format_bytes

__all__ = ["Engine", "Request", "rows_of"]


@dataclass(eq=False)
class _Running:
    """A request that has its blocks."""

    request: Request
    sequence: Sequence
    generator: torch.Generator
    read_tokens: int = 0  # of the prompt


class Engine:
    """Runs requests on a loaded model within a plan's budget."""

    def __init__(self, loaded: LoadedModel, plan: Plan) -> None:
        """
        Raises:
            BudgetExceeded: what the process holds after loading leaves no room for what was
            planned.
        """
        self.loaded, self.plan = loaded, plan
        self.budget = Budget(plan.budget_bytes)
        self.device = device_of(plan.recipe)
        self.pool = new_pool(plan, self.budget, self.device)
        self.cache = PagedCache(plan.recipe.model, self.pool, rows_of(plan.recipe))
        self._waiting: deque[Request] = deque()
        self._reading: _Running | None = None
        self._writing: list[_Running] = []
        self._held: list[Sequence] = []  # by `reading`

    def submit(self, request: Request) -> None:
        """Queue `request`.

        Raises:
            PromptError: prompt and output are longer than the model's context, or than it was
                loaded for.
            DoesNotFit: the pool could never hold it.
        """
        self._refuse(request)
        self._waiting.append(request)

    @contextmanager
    def reading(
        self, ids: list[int], start: Start | None = None, on_prefill: OnPrefill | None = None
    ) -> Iterator[Sequence]:
        """Read `ids`, behind `start`, and hold the sequence, to save it or to begin others with it:
        of the plan's `sequences` it is one. Meanwhile no other request goes on.

        Raises:
            PromptError: it is empty, or longer than the model's context, or than it was loaded for.
            DoesNotFit: the pool could never hold it.
            BudgetExceeded: others have too many of its blocks.
        """
        request = Request(ids, 1, on_prefill=on_prefill, start=start)
        self._refuse(request)
        sequence = self._opened(request)
        self._held.append(sequence)
        try:
            running = _Running(request, sequence, torch.Generator(self.device))
            with torch.inference_mode():
                while running.read_tokens < len(ids):
                    self._read_chunk(running)
            yield sequence
        finally:
            self._held.remove(sequence)
            sequence.close()

    def _refuse(self, request: Request) -> None:
        """Raises what `submit` does."""
        can_read = techniques.most_tokens(self.plan.recipe)
        if request.capacity_tokens > can_read:
            raise PromptError(
                f"{len(request.prompt_ids):,} prompt tokens and {request.max_new_tokens:,} new "
                f"ones are more than the {can_read:,} that {self.plan.recipe.model.name} can read."
            )
        most_tokens = self.loaded.max_tokens
        if most_tokens is not None and request.capacity_tokens > most_tokens:
            raise PromptError(
                f"The model was loaded with rotary frequencies for {most_tokens:,} tokens at most; "
                f"this sequence would have {request.capacity_tokens:,}."
            )
        pool = self.pool
        blocks = techniques.sequence_blocks(self.plan.recipe, request.capacity_tokens)
        if blocks > pool.num_blocks:
            raise DoesNotFit(
                f"The request needs {format_bytes(blocks * pool.block_bytes)} of KV entries; the "
                f"pool has {format_bytes(pool.nbytes)} in all.",
                needed_bytes=blocks * pool.block_bytes,
            )

    @property
    def idle(self) -> bool:
        """Whether nothing waits, reads or writes."""
        return not (self._waiting or self._reading or self._writing)

    @torch.inference_mode()
    def step(self) -> None:
        """One chunk of a prompt, if one is being read, and one token for each sequence that
        writes.

        Raises:
            Exception: whatever stops a forward pass, as torch.OutOfMemoryError or KeyboardInterrupt
                do. The requests in that pass are `broken`, their blocks free; the others go on.
            BudgetExceeded: what `reading` holds leaves no room for a request, which is `broken`.
            InputError: what a request starts with cannot be read; the request is `broken`.
            RuntimeError: blocks that are lost or free twice once nothing runs: a bug.
        """
        self._admit()
        writing = list(self._writing)
        if self._reading is not None:
            self._prefill(self._reading)
        if writing:
            self._decode(writing)
        if self.idle:
            self.pool.check_integrity(all_free=not self._held)

    def generate(self, request: Request) -> Iterator[int]:
        """The new tokens of `request` as they come, its end token included. Blocks go back when the
        iteration ends, whatever ends it.

        Raises:
            UllageError: a step that this request shared with others failed.
        """
        self.submit(request)
        sent = 0
        try:
            while not request.finished or sent < len(request.output_ids):
                if sent == len(request.output_ids):
                    self.step()
                new = request.output_ids[sent:]  # others may step the engine between two of them
                yield from new
                sent += len(new)
            if request.broken:
                raise UllageError("The step that wrote this text was interrupted: ask again.")
        finally:
            self.cancel(request)

    def cancel(self, request: Request) -> None:
        """Forget `request` and give its blocks back; nothing when it is gone already."""
        if request in self._waiting:
            self._waiting.remove(request)
        request.finished = True
        if self._reading is not None and self._reading.request is request:
            self._reading.sequence.close()
            self._reading = None
        for running in [running for running in self._writing if running.request is request]:
            self._finish(running)

    def _admit(self) -> None:
        """Let the longest-waiting request in when nobody reads and the pool has room; where nothing
        runs or is held, it has."""
        if self._reading is not None or not self._waiting:
            return
        request = self._waiting[0]
        blocks = techniques.sequence_blocks(self.plan.recipe, request.capacity_tokens)
        batch_full = len(self._writing) >= self.plan.recipe.workload.sequences
        if batch_full or (self._writing and blocks > self.pool.free_blocks):
            return
        try:
            preface = chosen(self.loaded.model, request.about_ids or request.prompt_ids)
            sequence = self._opened(request, preface)
        except BaseException as error:
            if isinstance(error, BudgetExceeded) and self._writing:
                return  # enough is free, in pieces too small: those that write end one day
            request.broken = True
            self.cancel(request)
            raise
        generator = torch.Generator(self.device).manual_seed(request.seed)
        self._reading = _Running(self._waiting.popleft(), sequence, generator)

    def _opened(self, request: Request, preface: Preface | None = None) -> Sequence:
        """Raises what `PagedCache.open` and `Start.opened` do."""
        if request.start is None:
            sequence = self.cache.open(request.capacity_tokens)
        else:
            sequence = request.start.opened(self.cache, request.capacity_tokens)
        try:
            if preface is not None:
                preface.put_before(sequence, request.prompt_ids)
        except BaseException:
            sequence.close()
            raise
        return sequence

    def _prefill(self, running: _Running) -> None:
        logits = self._read_chunk(running)
        if running.read_tokens == len(running.request.prompt_ids):
            self._reading = None
            self._writing.append(running)
            self._take(running, _sample(logits[0], running.request.temperature, running.generator))

    def _read_chunk(self, running: _Running) -> torch.Tensor:
        """The next tokens of its prompt: logits, [1, V], of the last."""
        request, start = running.request, running.read_tokens
        chunk = self.plan.recipe.execution.prefill_chunk or len(request.prompt_ids)
        ids = request.prompt_ids[start : start + chunk]
        logits = self._forward([running], [ids])
        running.read_tokens += len(ids)
        if request.on_prefill is not None:
            request.on_prefill(running.read_tokens, len(request.prompt_ids))
        return logits

    def _decode(self, batch: list[_Running]) -> None:
        logits = self._forward(batch, [running.request.output_ids[-1:] for running in batch])
        for running, row in zip(batch, logits, strict=True):
            self._take(running, _sample(row, running.request.temperature, running.generator))

    def _forward(self, batch: list[_Running], ids: list[list[int]]) -> torch.Tensor:
        """Logits of each sequence's last token, [B, V] in fp32, after reading `ids`."""
        self.cache.activate([running.sequence for running in batch])
        starts = [[running.sequence.length] for running in batch]
        positions = torch.tensor(starts) + torch.arange(len(ids[0]))  # [B, N]
        try:
            output = self.loaded.model(
                input_ids=torch.tensor(ids, device=self.device),
                position_ids=positions.to(self.device),
                **cache_argument(self.loaded.model, self.cache),
                use_cache=True,
                logits_to_keep=1,
            )
        except BaseException:
            # some layers hold the new tokens and some do not: none of the batch can go on
            for running in batch:
                running.request.broken = True
                self.cancel(running.request)
            raise
        return output.logits[:, -1].float()  # type: ignore[no-any-return]

    def _take(self, running: _Running, token: int) -> None:
        request = running.request
        request.output_ids.append(token)
        full = len(request.output_ids) == request.max_new_tokens
        if full or token in self.loaded.eos_token_ids:
            self._finish(running)

    def _finish(self, running: _Running) -> None:
        running.request.finished = True
        running.sequence.close()
        self._writing.remove(running)


def rows_of(recipe: Recipe) -> dict[int, MakeRow]:
    """The rows of the layers that a technique keeps its own way."""
    chain = [techniques.create(choice) for choice in recipe.techniques]
    return {
        layer: make_row
        for technique in chain
        for layer, make_row in technique.rows(recipe.model).items()
    }


def _sample(logits: torch.Tensor, temperature: float, generator: torch.Generator) -> int:
    """A token from logits [V]: the likeliest at temperature 0, else drawn from the softmax."""
    if temperature == 0:
        return int(logits.argmax())
    weights = (logits / temperature).softmax(dim=-1)
    return int(torch.multinomial(weights, 1, generator=generator))
