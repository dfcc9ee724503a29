"""Settings of Dynamic Memory Sparsification, and what each head holds by them. No torch.

Each KV head decides for each token whether it stays; one that goes is still seen until `window`
tokens more are written, then its slot is free. Of T tokens a head keeps window + kept (T - window)
on average.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Literal, Self, get_args

from ullage.errors import SizeError, TechniqueError
from ullage.specs.blocks import block_bytes, full_layer_numbers, full_layers
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.survivors import SINKS, Survival
from ullage.specs.workload import Engine, Execution, Step, Workload
from ullage.techniques.base import Technique, with_full_layers
from ullage.techniques.dms.adapter import ADAPTERS, DECIDED_TOKENS, LEARNED
from ullage.techniques.dms.budget import LEAST_KEPT, most_kept
from ullage.techniques.dms.overhead import scratch_bytes, state_bytes
from ullage.techniques.dms.sharing import shared_out
from ullage.units import KIB, parse_bytes

if TYPE_CHECKING:
    import numpy
    from transformers import PreTrainedModel

    from ullage.kv.cache import MakeRow

Predictor = Literal["expected-attention", "window", "linear", "dms"]

USUAL_KEPT = 0.5


@dataclass(frozen=True)
class DMS(Technique):
    """`kept` is the share of tokens that stay once they leave the `window`, in tokens: a half where
    nothing is said. Which, `predictor` says: by the attention that they can expect, without
    training; or, whatever `kept` is below 1, none but the first few, the baseline. Decisions wait
    for `lag` tokens more.

    With an `adapter`, a file or a shipped one's name, `kept` and `window` say how many entries a
    head holds on average where a sequence is as long as the model reads, and the adapter how many
    of them each head holds, in a window and as survivors.

    A `budget` is what the KV entries of one sequence may take, as in "64MiB", in all layers that
    DMS acts on, windows and slack of blocks included. It stands in the place of `kept`, which is
    None until `settled` finds it.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2506.05345"
    acts_on: ClassVar[Literal["kv"]] = "kv"
    engines: ClassVar[tuple[Engine, ...]] = ("ullage",)

    kept: float | None = None
    window: int = 512
    predictor: Predictor = "expected-attention"
    adapter: str = ""
    lag: int = 0
    budget: str = ""

    def __post_init__(self) -> None:
        if self.kept is None and not self.budget:
            object.__setattr__(self, "kept", USUAL_KEPT)
        self._check_numbers()
        self._check_predictor()
        self._check_budget()

    def _check_numbers(self) -> None:
        kept, window, lag = self.kept, self.window, self.lag
        if kept is not None and (type(kept) not in (int, float) or not 0 < kept <= 1):
            raise TechniqueError(f"dms: kept is above 0 and at most 1, not {kept!r}.")
        if type(window) is not int or window < 1:
            raise TechniqueError(f"dms: window is a positive count of tokens, not {window!r}.")
        if type(lag) is not int or not 0 <= lag < window:
            raise TechniqueError(
                f"dms: lag is a count of tokens below the window's {window}, not {lag!r}."
            )

    def _check_predictor(self) -> None:
        if self.predictor not in get_args(Predictor):
            known = ", ".join(get_args(Predictor))
            raise TechniqueError(f"dms: predictor is one of {known}, not {self.predictor!r}.")
        if type(self.adapter) is not str:
            raise TechniqueError(f"dms: adapter is a name or a path, not {self.adapter!r}.")
        if self.adapter:
            ADAPTERS.load(self.adapter)
        if self.predictor in LEARNED and self._learned is None:
            raise TechniqueError(
                f"dms: predictor={self.predictor} needs an adapter that has learned it: see "
                "`ullage train dms --help`."
            )

    def _check_budget(self) -> None:
        if type(self.budget) is not str:
            raise TechniqueError(f"dms: budget is a size as in 64MiB, not {self.budget!r}.")
        if not self.budget:
            return
        if self.kept is not None:
            raise TechniqueError("dms: kept follows from a budget: give one of the two.")
        if self.predictor == "window":
            raise TechniqueError(
                "dms: predictor=window holds its window whatever the budget: set the window."
            )
        try:
            parse_bytes(self.budget)
        except SizeError as error:
            raise TechniqueError(f"dms: budget {error}") from None

    @property
    def _learned(self) -> "numpy.ndarray | None":
        """The weights of a learned predictor, [L, Hkv, E]."""
        if not self.adapter:
            return None
        return ADAPTERS.load(self.adapter).predictors.get(self.predictor)

    @classmethod
    def neutral(cls) -> Self:
        return cls(kept=1.0)

    def settled(self, model: ModelSpec, work: Workload, execution: Execution) -> Self:
        """With the largest `kept` whose entries are inside the budget at the full length of a
        sequence.

        Raises:
            TechniqueError: the budget is below the windows and the first tokens; or the model is
                one that `unsupported` names.
        """
        if not self.budget:
            return self
        self._refuse(self.unsupported(model))
        tokens, one_bytes = work.context_tokens, block_bytes(model, execution.kv_dtype)

        def held_bytes(kept: float) -> int:
            return replace(self, kept=kept, budget="").held_blocks(model, tokens) * one_bytes

        kept = most_kept(held_bytes, parse_bytes(self.budget))
        if kept is not None:
            return replace(self, kept=kept, budget="")
        least_bytes = min(held_bytes(LEAST_KEPT), held_bytes(1.0))
        raise TechniqueError(
            f"dms: a budget of {self.budget} is below the window and the first tokens: the "
            f"smallest that works for {tokens:,} tokens is {-(-least_bytes // KIB)}KiB."
        )

    def _refuse(self, reason: str | None) -> None:
        if reason is not None:
            raise TechniqueError(f"{self.name} cannot act on this model: {reason}")

    def survivals(self, model: ModelSpec) -> dict[int, tuple[Survival, ...]]:
        """Who survives in a layer that keeps every token, by its number: one for each KV head.

        Raises:
            TechniqueError: the adapter is missing or damaged.
        """
        layers = full_layer_numbers(model)
        if not self.adapter:
            return dict.fromkeys(layers, (self._alike,) * model.num_kv_heads)
        adapter = ADAPTERS.load(self.adapter)
        shares = shared_out(adapter, *self._held(model), self.predictor != "window")
        every = self._every(min(share.window for layer in shares for share in layer))
        made = [
            tuple(Survival(kept, window, every, SINKS) for window, kept in layer)
            for layer in shares
        ]
        return dict(zip(layers, made, strict=True))

    def _held(self, model: ModelSpec) -> tuple[float, int]:
        """Entries a head on average, of a sequence as long as the model reads, and that length."""
        context = model.max_context_tokens
        window = min(self.window, context)
        return window + self._share * (context - window), context

    @property
    def _share(self) -> float:
        """What survives of what leaves the windows."""
        if self.kept is None:
            raise TechniqueError(
                f"dms: what a budget of {self.budget} keeps depends on the length: settle it, as "
                "technique.settled(spec, workload, execution)."
            )
        return 0.0 if self.predictor == "window" else self.kept

    def _every(self, window: int) -> int:
        """Tokens that are decided on at once where the least window is `window`: none may leave it
        undecided.

        Raises:
            TechniqueError: that is not above the lag.
        """
        if window <= self.lag:
            raise TechniqueError(
                f"dms: a lag of {self.lag} tokens is not below the least window, {window}."
            )
        return min(DECIDED_TOKENS, window - self.lag)

    @property
    def _alike(self) -> Survival:
        """Of each head where there is no adapter."""
        return Survival(self._share, self.window, self._every(self.window), SINKS)

    def unsupported(self, model: ModelSpec) -> str | None:
        if self.kept == 1:
            return None
        if not full_layers(model):
            return "no layer of it keeps keys and values of every token, head by head."
        return ADAPTERS.load(self.adapter).unsuited(model) if self.adapter else None

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        if self.kept == 1:
            return before
        one_bytes = block_bytes(model, work.execution.kv_dtype)
        sequence_bytes = self.held_blocks(model, work.held_tokens) * one_bytes
        sequence_bytes += state_bytes(self, model, work, self._kinds(model))
        after = with_full_layers(before, model, work, sequence_bytes)
        learned_bytes = 0 if self._learned is None else self._learned.nbytes
        after = replace(after, weights_bytes=after.weights_bytes + learned_bytes)
        if work.phase == "load":
            return after
        activation_bytes = after.activation_bytes + scratch_bytes(self, model, work)
        return replace(after, activation_bytes=activation_bytes)

    def held_blocks(self, model: ModelSpec, tokens: int) -> int:
        if self.kept == 1:
            return super().held_blocks(model, tokens)
        kinds = self._kinds(model)
        return sum(heads * survival.blocks(tokens) for survival, heads in kinds.items())

    def _kinds(self, model: ModelSpec) -> Mapping[Survival, int]:
        """How many heads there are of each kind."""
        if not self.adapter:
            return {self._alike: full_layers(model) * model.num_kv_heads}
        return Counter(chain.from_iterable(self.survivals(model).values()))

    @contextmanager
    def attach(self, model: "PreTrainedModel") -> Iterator[None]:
        from ullage.kv.attach import rows_in
        from ullage.kv.sparse import SparseRow
        from ullage.specs.families import spec_from_config

        spec = spec_from_config(model.config.get_text_config().to_dict())
        self._refuse(self.unsupported(spec))
        if not spec.runs and self.kept != 1:
            self._refuse(f"ullage plans {spec.family} models and does not run them yet.")
        rows = self.rows(spec)
        if not rows:
            yield
            return
        if self.adapter:
            from ullage.kv.fingerprint import fingerprint

            if fingerprint(model) != ADAPTERS.load(self.adapter).fingerprint:
                raise TechniqueError(f"dms: {self.adapter} was made for other weights than these.")
        with rows_in(model, rows, SparseRow, "DMS"):
            yield

    def rows(self, model: ModelSpec) -> "Mapping[int, MakeRow]":
        if self.kept == 1:
            return {}
        from ullage.techniques.dms.rows import row_maker

        learned = self._learned
        return {
            layer: row_maker(self, heads, None if learned is None else learned[at])
            for at, (layer, heads) in enumerate(self.survivals(model).items())
        }
