"""What a run and a reading share: from options to an engine, refusing as early as can be known."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

from ullage import techniques
from ullage.cli.asked import PlanOptions
from ullage.cli.given import own_attention, refuse_bank, refuse_plan
from ullage.cli.machine import device_to_run, refuse_unusable
from ullage.errors import DoesNotFit, InputError, PromptError
from ullage.planner import build_plan, fit_run
from ullage.planner.search import Freedom, as_memory_option, describe
from ullage.runtime.process import obtainable_bytes
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan
from ullage.specs.saved import SavedText
from ullage.specs.workload import Workload
from ullage.techniques.camelot.settings import CAMELoT
from ullage.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ullage.runtime.engine import Engine

_LONG_PREFILL_TOKENS = 1024  # from here on a progress bar is worth its line
_TEMPLATE_TOKENS = 256  # more than a chat template or a tokenizer adds to a prompt


@dataclass
class Session:
    """From options to an engine, refusing as early as can be known."""

    spec: ModelSpec
    options: PlanOptions
    given: Plan | None = None
    bank: SavedText | None = None  # what was read before the prompt
    called: str = "prompt"  # what is read, in messages

    def __post_init__(self) -> None:
        if self.bank is not None:
            refuse_bank(self.bank, self.spec)
        asked = self.options.attention
        if asked is not None and asked != "sdpa":
            raise InputError(own_attention("--attention", asked))
        if self.given is None:
            device = device_to_run(self.options.device)
        else:
            refuse_plan(self.given, self.spec)
            device = self.given.recipe.device
            refuse_unusable(device)
        self.budget_bytes = (
            self.options.budget_bytes(device)
            if self.given is None or self.options.memory is not None
            else self.given.budget_bytes
        )
        if self.given is None and self.options.memory is None and device.kind == "cpu":
            self.budget_bytes = min(self.budget_bytes, obtainable_bytes())
        self.device = device
        self.calibration = self.options.read_calibration()

    @cached_property
    def most_tokens(self) -> int:
        """Of a prompt and its answer, that the model can read behind what it has read."""
        if self.given is not None:
            return techniques.most_tokens(replace(self.given.recipe, model=self.spec))
        recipe = self.options.recipe(self.spec, self.device, Workload(1, 1))
        return techniques.most_tokens(recipe) - self.past_tokens

    @property
    def past_tokens(self) -> int:
        """Read before the prompt."""
        return 0 if self.bank is None else self.bank.record.tokens

    @property
    def _way_out(self) -> str:
        """How a longer text is read, as the end of a sentence, where it can be."""
        if self.given is not None or self.bank is not None:
            return ""
        chosen = {one.acts_on: one.name for one in map(techniques.parse, self.options.technique)}
        if "context" in chosen:
            return ""
        camelot = CAMELoT()
        most_tokens = camelot.most_tokens(self.spec)
        if camelot.unsupported(self.spec) or most_tokens <= self.spec.max_context_tokens:
            return ""
        instead = f" in place of {chosen['kv']}" if "kv" in chosen else ""
        return f": `--technique {camelot.name}`{instead} reads texts of any length"

    def refuse_early(self, text: str, new_tokens: int) -> None:
        """Refuse a budget too small for a prompt of one token before anything heavy is imported.

        Raises:
            DoesNotFit: names a budget that is enough for `text`, a token a byte at most.
        """
        try:
            self.plan_for(1, new_tokens)
        except DoesNotFit as error:
            most_tokens = len(text.encode()) + _TEMPLATE_TOKENS
            room = max(1, self.most_tokens - new_tokens)
            enough_bytes = self._smallest_bytes(min(most_tokens, room), new_tokens)
            after = f" and {new_tokens:,} tokens after it" if self.called == "prompt" else ""
            raise DoesNotFit(
                f"{self.spec.name} with this {self.called}{after} does not fit in "
                f"{format_bytes(self.budget_bytes)}: {as_memory_option(enough_bytes)} is enough.",
                needed_bytes=enough_bytes,
            ) from error

    def _smallest_bytes(self, prompt_tokens: int, new_tokens: int) -> int:
        """The smallest budget that works for a prompt of that many tokens."""
        try:
            return self.plan_for(prompt_tokens, new_tokens).peak_bytes
        except DoesNotFit as error:
            return error.needed_bytes

    def tokenize(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of the prompt, without what begins a text behind what was read before; the
        folder and the tokenizer are ready afterwards."""
        from ullage.runtime.allocator import return_freed_memory
        from ullage.runtime.checkpoint import weights_folder

        return_freed_memory()
        self.folder = weights_folder(self.spec)
        from ullage.runtime.load import load_tokenizer
        from ullage.runtime.prompt import refuse_long, token_ids

        self.tokenizer = load_tokenizer(self.folder)
        refuse_long(text, self.tokenizer, self.most_tokens - 1, self.called, self._way_out)
        if chat:
            ids = _chat_ids(self.tokenizer, text)
            return ids if self.bank is None else _without_beginning(self.tokenizer, ids)
        return token_ids(text, self.tokenizer, begins=self.bank is None)

    def plan_for(self, prompt_tokens: int, new_tokens: int) -> Plan:
        """The plan that runs: the given one at this size, or the first variant that fits. What was
        read before is counted as if it were read again, which is no less.

        Raises:
            PromptError: the prompt is longer than the model's context.
            DoesNotFit: no variant fits.
        """
        room = self.most_tokens - prompt_tokens
        if room < 1:
            behind = "" if self.bank is None else f" behind the {self.past_tokens:,} of its bank"
            raise PromptError(
                f"The {self.called} has {prompt_tokens:,} tokens; {self.spec.name} reads "
                f"{max(0, self.most_tokens):,}{behind}, the answer included{self._way_out}."
            )
        work = Workload(self.past_tokens + prompt_tokens, min(new_tokens, room))
        if self.given is not None:
            recipe = replace(self.given.recipe, model=self.spec, workload=work)
            freedom = Freedom(weights=False, kv_dtype=False, prefill_chunk=False)
        else:
            recipe = self.options.recipe(self.spec, self.device, work)
            freedom = self.options.freedom()
        choice = fit_run(recipe, self.budget_bytes, freedom, self.calibration)
        return build_plan(choice.recipe, self.budget_bytes, self.calibration)

    def _reason(self, plan: Plan) -> str:
        """Why this recipe and not the one that was asked for."""
        if self.given is not None:
            return "as the plan says"
        recipe = self.options.recipe(self.spec, self.device, plan.recipe.workload)
        asked = build_plan(recipe, plan.budget_bytes, self.calibration)
        if asked.recipe == plan.recipe:
            return "nothing had to shrink"
        return (
            f"{describe(asked.recipe)} would need {format_bytes(asked.peak_bytes)}, and of what "
            "fits this loses least"
        )

    def load(self, plan: Plan) -> "Engine":
        """The engine on the loaded model; says what was chosen and why."""
        from ullage.runtime.engine import Engine
        from ullage.runtime.load import load_model

        console = Console(stderr=True, highlight=False, soft_wrap=True)
        console.print(
            f"{describe(plan.recipe)}: planned peak {format_bytes(plan.peak_bytes)} of "
            f"{format_bytes(plan.budget_bytes)}; {self._reason(plan)}"
        )
        with progress_bar("reading weights", DownloadColumn()) as progress:
            task = progress.add_task("", total=None)
            loaded = load_model(
                plan,
                self.folder,
                self.tokenizer,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        return Engine(loaded, plan)


def peaks(plan: Plan, measured_bytes: int) -> str:
    """Planned and measured, in words."""
    return (
        f"planned peak {format_bytes(plan.peak_bytes)}, measured {format_bytes(measured_bytes)} "
        f"({measured_bytes / plan.peak_bytes - 1:+.1%} of planned), "
        f"budget {format_bytes(plan.budget_bytes)}"
    )


def progress_bar(
    what: str, column: MofNCompleteColumn | DownloadColumn, tokens: int | None = None
) -> Progress:
    """A bar on stderr that goes away when it is done; none for a short prompt."""
    return Progress(
        TextColumn(what),
        BarColumn(),
        column,
        console=Console(stderr=True),
        transient=True,
        disable=tokens is not None and tokens < _LONG_PREFILL_TOKENS,
    )


def _chat_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    if not tokenizer.chat_template:
        raise InputError("This model has no chat template: leave --chat out.")
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _without_beginning(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> list[int]:
    """Chat templates write themselves what a tokenizer puts before any text; where it puts nothing
    there, the same token begins a turn, and stays."""
    beginning = tokenizer.bos_token_id
    begins_texts = tokenizer("a")["input_ids"][:1] == [beginning]
    return ids[1:] if begins_texts and ids[:1] == [beginning] else ids
