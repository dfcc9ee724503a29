"""ullage run: go on from a prompt, inside a budget."""

import time
from contextlib import closing
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

from ullage import techniques
from ullage.cli.asked import PlanOptions
from ullage.cli.given import own_attention, prompt_text, refuse_beside_plan, refuse_plan
from ullage.cli.machine import device_to_run, refuse_unusable
from ullage.cli.options import (
    AttentionOption,
    CalibrationOption,
    ChunkOption,
    DeviceOption,
    KvOption,
    MemoryOption,
    ModelArgument,
    RecipeOption,
    TechniqueOption,
    WeightsOption,
)
from ullage.errors import DoesNotFit, InputError, PromptError
from ullage.planner import build_plan, fit_run
from ullage.planner.search import Freedom, as_memory_option, describe
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only
from ullage.runtime.process import obtainable_bytes
from ullage.runtime.temperature import refuse_temperature
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan, read_plan
from ullage.specs.sources import resolve
from ullage.specs.workload import Workload
from ullage.units import format_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ullage.runtime.engine import Engine, Request

_LONG_PREFILL_TOKENS = 1024  # from here on a progress bar is worth its line
_LARGEST_SEED = (1 << 63) - 1
_TEMPLATE_TOKENS = 256  # more than a chat template or a tokenizer adds to a prompt


def run(
    model: ModelArgument,
    source: Annotated[
        str | None, typer.Argument(metavar="[-]", help="-: read the prompt from stdin.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A text file with the prompt.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Apply the model's chat template to the prompt.")
    ] = False,
    memory: MemoryOption = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Write this many at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token each time; else 0.001 to 1000.")
    ] = 0.0,
    seed: Annotated[
        int,
        typer.Option(min=0, max=_LARGEST_SEED, help="Of the draws, where temperature is above 0."),
    ] = 0,
    plan: Annotated[
        Path | None, typer.Option(help="Run as this plan says, written by `ullage plan --json`.")
    ] = None,
    device: DeviceOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    attention: AttentionOption = None,
    prefill_chunk: ChunkOption = None,
    technique: TechniqueOption = None,
    recipe: RecipeOption = None,
    calibration: CalibrationOption = None,
) -> None:
    """Run a model inside a byte budget that nothing exceeds.

    Weights, KV format and prefill chunk are chosen to fit where none is given. Text goes to stdout,
    the choice and the measured peak to stderr.
    """
    options = PlanOptions(
        device, memory, weights, kv_cache_dtype, attention, prefill_chunk, tuple(technique or ()),
        calibration=calibration,
    )  # fmt: skip
    refuse_temperature(temperature)
    spec = resolve(model)
    refuse_planned_only(spec)
    text = prompt_text(source, prompt, prompt_file)
    if plan is not None:
        refuse_beside_plan(options, recipe)
    session = _Session(
        spec, options.with_recipe(recipe, spec), None if plan is None else read_plan(plan)
    )
    session.refuse_early(text, max_new_tokens)
    ids = session.tokenize(text, chat)
    made = session.plan_for(len(ids), max_new_tokens)
    output_tokens = made.recipe.workload.output_tokens
    with out_of_memory.explained():
        engine = session.load(made)
        with closing(engine.loaded):
            _stream(engine, ids, output_tokens, temperature, seed, made)


@dataclass
class _Session:
    """From options to an engine, refusing as early as can be known."""

    spec: ModelSpec
    options: PlanOptions
    given: Plan | None

    def __post_init__(self) -> None:
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
        """Of a prompt and its answer, that the model can read."""
        if self.given is not None:
            return techniques.most_tokens(replace(self.given.recipe, model=self.spec))
        return techniques.most_tokens(self.options.recipe(self.spec, self.device, Workload(1, 1)))

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
            raise DoesNotFit(
                f"{self.spec.name} with this prompt and {new_tokens:,} tokens after it does not "
                f"fit in {format_bytes(self.budget_bytes)}: {as_memory_option(enough_bytes)} is "
                "enough.",
                needed_bytes=enough_bytes,
            ) from error

    def _smallest_bytes(self, prompt_tokens: int, new_tokens: int) -> int:
        """The smallest budget that works for a prompt of that many tokens."""
        try:
            return self.plan_for(prompt_tokens, new_tokens).peak_bytes
        except DoesNotFit as error:
            return error.needed_bytes

    def tokenize(self, text: str, chat: bool) -> list[int]:
        """Token ids of the prompt; the folder and the tokenizer are ready afterwards."""
        from ullage.runtime.allocator import return_freed_memory
        from ullage.runtime.checkpoint import weights_folder

        return_freed_memory()
        self.folder = weights_folder(self.spec)
        from ullage.runtime.load import load_tokenizer
        from ullage.runtime.prompt import refuse_long

        self.tokenizer = load_tokenizer(self.folder)
        refuse_long(text, self.tokenizer, self.most_tokens - 1)
        ids = _chat_ids(self.tokenizer, text) if chat else self.tokenizer(text)["input_ids"]
        return list(ids)

    def plan_for(self, prompt_tokens: int, new_tokens: int) -> Plan:
        """The plan that runs: the given one at this size, or the first variant that fits.

        Raises:
            PromptError: the prompt is longer than the model's context.
            DoesNotFit: no variant fits.
        """
        room = self.most_tokens - prompt_tokens
        if room < 1:
            raise PromptError(
                f"The prompt has {prompt_tokens:,} tokens; {self.spec.name} reads "
                f"{self.most_tokens:,}, the answer included."
            )
        work = Workload(prompt_tokens, min(new_tokens, room))
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
        with _progress("reading weights", DownloadColumn()) as progress:
            task = progress.add_task("", total=None)
            loaded = load_model(
                plan,
                self.folder,
                self.tokenizer,
                lambda done, total: progress.update(task, completed=done, total=total),
            )
        return Engine(loaded, plan)


def _chat_ids(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    if not tokenizer.chat_template:
        raise InputError("This model has no chat template: leave --chat out.")
    messages = [{"role": "user", "content": text}]
    encoded = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    return list(encoded["input_ids"])


def _stream(
    engine: "Engine", ids: list[int], new_tokens: int, temperature: float, seed: int, plan: Plan
) -> None:
    import torch
    from transformers import TextStreamer

    from ullage.runtime.engine import Request
    from ullage.runtime.memory import peak_bytes

    streamer = TextStreamer(engine.loaded.tokenizer, skip_special_tokens=True)
    start_s = time.perf_counter()
    first_s = start_s
    with _progress("reading the prompt", MofNCompleteColumn(), len(ids)) as progress:
        task = progress.add_task("", total=len(ids))
        request = Request(
            ids, new_tokens, temperature, seed,
            on_prefill=lambda done, _: progress.update(task, completed=done),
        )  # fmt: skip
        tokens = engine.generate(request)
        first = next(tokens)
        first_s = time.perf_counter()
    streamer.put(torch.tensor([first]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    _summary(
        plan, request, first_s - start_s, time.perf_counter() - first_s, peak_bytes(engine.device)
    )


def _summary(
    plan: Plan, request: "Request", first_s: float, rest_s: float, measured_bytes: int
) -> None:
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    rest = len(request.output_ids) - 1
    rate = f", then {rest / rest_s:.1f} tokens/s" if rest and rest_s > 0 else ""
    console.print(
        f"{len(request.prompt_ids):,} prompt tokens read in {first_s:.1f} s{rate}; planned peak "
        f"{format_bytes(plan.peak_bytes)}, measured {format_bytes(measured_bytes)} "
        f"({measured_bytes / plan.peak_bytes - 1:+.1%} of planned), "
        f"budget {format_bytes(plan.budget_bytes)}"
    )


def _progress(
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
