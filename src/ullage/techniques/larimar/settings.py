"""Settings of Larimar, and what facts take by them. No torch."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from ullage.errors import TechniqueError
from ullage.specs.blocks import full_layers
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.footprint import Footprint
from ullage.specs.layer import layer_width
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Engine, Step
from ullage.techniques.base import Technique
from ullage.techniques.larimar.adapter import ADAPTERS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 512  # of the text that a fact's entries are made of
MOST_ENTRIES = 256  # of a fact, in each layer
READ_TOKENS = 64  # of the text that go through the model at once
HELD_MIB = 32
_FP32_COPIES = 4  # of a fact's entries, while latents are made of them or they of latents
_MIB = 1 << 20


@dataclass(frozen=True)
class Larimar(Technique):
    """The facts of the ledger at `ledger` are read by prompts that name their subjects; no ledger
    is the model as it is. With the readout "kv" they are read as the entries that the model itself
    makes of them; with "latent" as an adapter makes them of less, which is one that is shipped, by
    its name, or a file. Of `held` MiB of what is kept those stay that were read last.

    `tokenizer` is the folder of the model's; without it, that which the model was read from.
    """

    paper: ClassVar[str] = "https://arxiv.org/abs/2403.11901"
    acts_on: ClassVar[Literal["facts"]] = "facts"
    engines: ClassVar[tuple[Engine, ...]] = ("ullage",)

    ledger: str = ""
    readout: Literal["kv", "latent"] = "kv"
    adapter: str = ""
    held: int = HELD_MIB
    tokenizer: str = ""

    def __post_init__(self) -> None:
        if type(self.held) is not int or self.held < 1:
            raise TechniqueError(f"larimar: held is a positive count of MiB, not {self.held!r}.")
        if self.readout not in ("kv", "latent"):
            raise TechniqueError(f"larimar: readout is kv or latent, not {self.readout!r}.")
        self._refuse_adapter()
        if not isinstance(self.ledger, str) or (self.ledger and not Path(self.ledger).is_file()):
            raise TechniqueError(
                f'larimar: there is no ledger at {self.ledger!r}: `ullage memory add DB "..."` '
                "begins one."
            )
        if not isinstance(self.tokenizer, str) or (
            self.tokenizer and not Path(self.tokenizer).is_dir()
        ):
            raise TechniqueError(f"larimar: tokenizer is a folder, not {self.tokenizer!r}.")

    def _refuse_adapter(self) -> None:
        if not isinstance(self.adapter, str):
            raise TechniqueError(f"larimar: adapter is a name or a path, not {self.adapter!r}.")
        if bool(self.adapter) != (self.readout == "latent"):
            raise TechniqueError(
                "larimar: readout=latent and adapter=NAME go together: a file that `ullage train "
                f"larimar` wrote, or one that is shipped: {ADAPTERS.known()}."
            )
        if self.adapter:
            ADAPTERS.load(self.adapter)

    @classmethod
    def neutral(cls) -> Self:
        return cls()

    def unsupported(self, model: ModelSpec) -> str | None:
        if not self.ledger:
            return None
        reason = unsupported(model)
        if reason is None and self.adapter:
            reason = ADAPTERS.load(self.adapter).unsuited(model)
        return reason

    def footprint(self, before: Footprint, model: ModelSpec, work: Step) -> Footprint:
        """Adds the adapter to the weights, in fp32; to the entries what is held of facts, and what
        each sequence sees of one that may be held no longer, or in another format; and, as scratch,
        what is there while one is made: between two forward passes, which takes no more than a
        prompt's pass of as many tokens."""
        if not self.ledger:
            return before
        adapter_bytes = ADAPTERS.load(self.adapter).nbytes if self.adapter else 0
        after = replace(before, weights_bytes=before.weights_bytes + adapter_bytes)
        if work.phase == "load":
            return after
        number_bytes = DTYPE_BYTES[work.execution.dtype]
        width = 2 * model.num_layers * model.num_kv_heads * model.head_dim
        seen_bytes = work.sequences * MOST_ENTRIES * width * number_bytes
        made_bytes = (MOST_ENTRIES + 2 * MOST_TOKENS) * width * number_bytes
        if self.adapter:
            made_bytes += _FP32_COPIES * MOST_ENTRIES * width * 4
        if work.phase == "prefill":
            more_tokens = max(0, READ_TOKENS - work.new_tokens)
            made_bytes += more_tokens * layer_width(model) * number_bytes
        return replace(
            after,
            kv_bytes=after.kv_bytes + self.held * _MIB + seen_bytes,
            activation_bytes=after.activation_bytes + made_bytes,
        )

    @contextmanager
    def attach(self, model: "PreTrainedModel") -> Iterator[None]:
        from ullage.specs.families import spec_from_config

        spec = spec_from_config(model.config.get_text_config().to_dict())
        reason = self.unsupported(spec)
        if reason is None and self.ledger and not spec.runs:
            reason = f"ullage plans {spec.family} models and does not run them yet."
        if reason is not None:
            raise TechniqueError(f"{self.name} cannot act on this model: {reason}")
        if not self.ledger:
            yield
            return
        from ullage.techniques.larimar.facts import FactMemory, tokenizer_of
        from ullage.techniques.larimar.ledger import Ledger

        adapter = ADAPTERS.load(self.adapter) if self.adapter else None
        tokenizer = tokenizer_of(model, self.tokenizer)
        with (
            Ledger(Path(self.ledger), read_only=True) as ledger,
            FactMemory(model, tokenizer, ledger, held_bytes=self.held * _MIB, adapter=adapter),
        ):
            yield


def unsupported(model: ModelSpec) -> str | None:
    """Why no facts can be read before the prompts of `model`; None when they can."""
    sliding = sum(cache.window is not None for cache in model.caches)
    if full_layers(model) + sliding < model.num_layers:
        return "not every layer of it keeps keys and values, head by head."
    if not model.rope_tables:
        return "its positions are not rotary: nothing can stand before the first."
    return None
