"""The two sides of a comparison: one model, dense and with techniques, each with its own cache."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from ullage import techniques
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.cache import Sequence as CachedSequence
from ullage.kv.pool import KVPool
from ullage.runtime.engine import rows_of
from ullage.runtime.load import TORCH_DTYPES
from ullage.specs.plan import Recipe
from ullage.techniques.base import Technique

CHUNK_TOKENS = 512  # read in one forward pass
_OPEN = 2  # sequences at a time: one that was read, and a copy that goes on from it


@dataclass(frozen=True)
class Answer:
    """What the model makes of given words: the log-likelihood of all of them, and whether each of
    its tokens is the likeliest after those before, so that greedy decoding writes them."""

    log_likelihood: float
    greedy: bool


class Side:
    """A model, and KV entries as its techniques keep them, in a pool for two sequences of the
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
    def open(self, tokens: int) -> Iterator[CachedSequence]:
        """A sequence with room for `tokens`, closed at the end."""
        sequence = self.cache.open(tokens)
        try:
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

    def answer(self, after: CachedSequence, asked: list[int], given: list[int]) -> Answer:
        """How likely `given` is once `asked` is read after a sequence, which stays as it was."""
        ids = torch.tensor([*asked, *given])
        sequence = after.copy()
        try:
            logits = self.logits(sequence, ids[:-1], keep=len(given))
        finally:
            sequence.close()
        wanted = ids[-len(given) :].to(self.device)
        likely = logits.log_softmax(-1)[torch.arange(len(given), device=self.device), wanted]
        return Answer(float(likely.sum()), bool((logits.argmax(-1) == wanted).all()))


@contextmanager
def both_sides(model: PreTrainedModel, recipe: Recipe) -> Iterator[tuple[Side, Side]]:
    """`model` dense, and a twin of it with the recipe's techniques, which are detached at the end.

    Raises:
        TechniqueError: a technique that cannot act on this model.
    """
    chain = [techniques.create(choice) for choice in recipe.techniques]
    with attached(model, chain) as changed:
        yield Side(model, replace(recipe, techniques=())), Side(changed, recipe)


@contextmanager
def attached(model: PreTrainedModel, chain: Sequence[Technique]) -> Iterator[PreTrainedModel]:
    """A twin of `model` with the techniques of `chain`. It has modules of its own, so that hooks
    and replaced modules are its alone, and shares the weights."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    twin = deepcopy(model, memo=shared)
    with ExitStack() as stack:
        for technique in chain:
            stack.enter_context(technique.attach(twin))
        yield twin
