"""The two sides of a comparison: one model, dense and with techniques, each with its own cache."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ullage import techniques
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.cache import Sequence as CachedSequence
from ullage.kv.pool import KVPool
from ullage.kv.prefaced import chosen
from ullage.runtime.engine import rows_of
from ullage.runtime.load import TORCH_DTYPES
from ullage.specs.plan import Recipe
from ullage.techniques.base import Technique

CHUNK_TOKENS = 512  # read in one forward pass
_OPEN = 3  # sequences at a time: a prompt, a question about it, and one of its answers


@dataclass(frozen=True)
class Answer:
    """What the model makes of given words: the log-likelihood of all of them, and whether each of
    its tokens is the likeliest after those before, so that greedy decoding writes them."""

    log_likelihood: float
    greedy: bool


class Side:
    """A model, and KV entries as its techniques keep them, in a pool for three sequences of the
    recipe's length."""

    def __init__(self, model: PreTrainedModel, recipe: Recipe) -> None:
        self.model = model
        spec, self.device = recipe.model, model.device
        self.pool = KVPool(
            _OPEN * techniques.sequence_blocks(recipe, recipe.workload.context_tokens),
            spec.head_dim,
            TORCH_DTYPES[recipe.execution.kv_dtype],
            self.device,
        )
        self.cache = PagedCache(spec, self.pool, rows_of(recipe))

    @contextmanager
    def open(self, tokens: int, prompt: Sequence[int] = ()) -> Iterator[CachedSequence]:
        """A sequence with room for `tokens`, closed at the end; behind the fact, if there is one,
        that `prompt`, which it begins with, is about."""
        sequence = self.cache.open(tokens)
        try:
            preface = chosen(self.model, list(prompt)) if prompt else None
            if preface is not None:
                preface.put_before(sequence, prompt)
            yield sequence
        finally:
            sequence.close()

    def live_bytes(self) -> int:
        """Bytes of the blocks that open sequences hold."""
        return self.cache.nbytes()

    @torch.inference_mode()
    def logits(self, sequence: CachedSequence, ids: torch.Tensor, keep: int = 0) -> torch.Tensor:
        """Read `ids`, [N], into `sequence`: the logits after each, or after the last `keep`,
        [N or keep, V] in fp32."""
        self.cache.activate([sequence])
        positions = torch.arange(sequence.length, sequence.length + len(ids), device=self.device)
        output = self.model(
            input_ids=ids[None].to(self.device),
            position_ids=positions[None],
            **cache_argument(self.model, self.cache),
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def read(self, sequence: CachedSequence, ids: torch.Tensor) -> None:
        """Read `ids`, [N], in chunks, for what comes after them."""
        for chunk in torch.split(ids, CHUNK_TOKENS):
            self.logits(sequence, chunk, keep=1)

    def answers(
        self, after: CachedSequence, asked: list[int], choices: Sequence[list[int]]
    ) -> list[Answer]:
        """How likely each of `choices` is once `asked` is read after a sequence, which stays as it
        was."""
        with _copied(after) as sequence:
            first = self.logits(sequence, torch.tensor(asked), keep=1)
            return [self._answer(sequence, first, given) for given in choices]

    def _answer(self, after: CachedSequence, first: torch.Tensor, given: list[int]) -> Answer:
        """`first` are the logits after the sequence, [1, V]."""
        logits = first
        if len(given) > 1:
            with _copied(after) as sequence:
                rest = self.logits(sequence, torch.tensor(given[:-1]))
            logits = torch.cat([first, rest])
        wanted = torch.tensor(given, device=logits.device)
        likely = logits.log_softmax(-1).gather(1, wanted[:, None])
        return Answer(float(likely.sum()), bool((logits.argmax(-1) == wanted).all()))


@contextmanager
def _copied(sequence: CachedSequence) -> Iterator[CachedSequence]:
    copy = sequence.copy()
    try:
        yield copy
    finally:
        copy.close()


@contextmanager
def both_sides(
    model: PreTrainedModel, dense: Recipe, compressed: Recipe
) -> Iterator[tuple[Side, Side]]:
    """`model`, loaded as `dense` says, and a twin of it with the techniques that `compressed` has
    beside those; they are detached at the end.

    Raises:
        TechniqueError: a technique that cannot act on this model.
    """
    more = [choice for choice in compressed.techniques if choice not in dense.techniques]
    with attached(model, [techniques.create(choice) for choice in more]) as changed:
        yield Side(model, dense), Side(changed, compressed)


@contextmanager
def attached(model: PreTrainedModel, chain: Sequence[Technique]) -> Iterator[PreTrainedModel]:
    """A twin of `model` with the techniques of `chain`. It has modules of its own, so that hooks
    and replaced modules are its alone, and shares the weights, which no technique may write to."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = deepcopy(model, memo=shared)
    with ExitStack() as stack:
        for technique in chain:
            stack.enter_context(technique.attach(twin))
        yield twin
