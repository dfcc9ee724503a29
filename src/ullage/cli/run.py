"""ullage run: go on from a prompt, inside a budget."""

import time
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn

from ullage import techniques
from ullage.cli.asked import PlanOptions
from ullage.cli.given import options_behind, options_knowing, prompt_text, refuse_beside_plan
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
from ullage.cli.session import Session, peaks, progress_bar
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only
from ullage.runtime.temperature import refuse_temperature
from ullage.specs.plan import Plan, read_plan
from ullage.specs.saved import SavedText, read_saved
from ullage.specs.sources import resolve
from ullage.techniques.larimar.gate import Gate
from ullage.techniques.larimar.ledger import Ledger
from ullage.techniques.larimar.settings import Larimar

if TYPE_CHECKING:
    from ullage.kv.cache import Start
    from ullage.runtime.engine import Engine, Request

_LARGEST_SEED = (1 << 63) - 1


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
    bank: Annotated[
        Path | None,
        typer.Option(
            metavar="BANK",
            help="Go on from what `ullage read` kept of a text; the prompt comes behind it.",
        ),
    ] = None,
    facts: Annotated[
        Path | None,
        typer.Option(
            metavar="DB",
            help="A ledger of `ullage memory`: a prompt that names what a fact in it is about is "
            "read behind that fact.",
        ),
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
        refuse_beside_plan(options, recipe, bank, facts)
    saved = None if bank is None else read_saved(bank)
    if saved is not None:
        options = options_behind(saved, options)
    if facts is not None:
        options = options_knowing(facts, options)
    session = Session(
        spec, options.with_recipe(recipe, spec), None if plan is None else read_plan(plan), saved
    )
    session.refuse_early(text, max_new_tokens)
    ids = session.tokenize(text, chat)
    made = session.plan_for(len(ids), max_new_tokens)
    known = _ledger(made)
    if known is not None:
        _say_what_is_known(known, text)
    output_tokens = made.recipe.workload.output_tokens
    with out_of_memory.explained():
        engine = session.load(made)
        with closing(engine.loaded):
            start = None if saved is None else _start(saved, engine)
            about = session.tokenize(text) if chat and known is not None else None
            _stream(engine, ids, output_tokens, temperature, seed, start, about)


def _ledger(plan: Plan) -> Path | None:
    """That whose facts are read, whether it is named by --facts, as a technique or by a plan."""
    chosen = map(techniques.create, plan.recipe.techniques)
    ledgers = [Path(one.ledger) for one in chosen if isinstance(one, Larimar) and one.ledger]
    return ledgers[0] if ledgers else None


def _say_what_is_known(facts: Path, text: str) -> None:
    with Ledger(facts, read_only=True) as ledger:
        ledger.verify()
        known = ledger.facts()
    number = Gate(known).scope(text)
    said = f"none of {len(known):,} facts is about this prompt"
    if number is not None:
        said = f"behind fact {number}: {known[number].text}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(escape(said))


def _start(saved: SavedText, engine: "Engine") -> "Start":
    from ullage.runtime.banks import saved_start

    return saved_start(saved, engine)


def _stream(
    engine: "Engine",
    ids: list[int],
    new_tokens: int,
    temperature: float,
    seed: int,
    start: "Start | None",
    about_ids: list[int] | None,
) -> None:
    import torch
    from transformers import TextStreamer

    from ullage.runtime.engine import Request

    streamer = TextStreamer(engine.loaded.tokenizer, skip_special_tokens=True)
    start_s = time.perf_counter()
    first_s = start_s
    with progress_bar("reading the prompt", MofNCompleteColumn(), len(ids)) as progress:
        task = progress.add_task("", total=len(ids))
        request = Request(
            ids, new_tokens, temperature, seed,
            on_prefill=lambda done, _: progress.update(task, completed=done), start=start,
            about_ids=about_ids,
        )  # fmt: skip
        tokens = engine.generate(request)
        first = next(tokens)
        first_s = time.perf_counter()
    streamer.put(torch.tensor([first]))
    for token in tokens:
        streamer.put(torch.tensor([token]))
    streamer.end()
    _summary(engine, request, first_s - start_s, time.perf_counter() - first_s)


def _summary(engine: "Engine", request: "Request", first_s: float, rest_s: float) -> None:
    from ullage.runtime.memory import peak_bytes

    rest = len(request.output_ids) - 1
    rate = f", then {rest / rest_s:.1f} tokens/s" if rest and rest_s > 0 else ""
    behind = "" if request.start is None else f" behind {request.start.length:,}"
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        f"{len(request.prompt_ids):,} prompt tokens{behind} read in {first_s:.1f} s{rate}; "
        f"{peaks(engine.plan, peak_bytes(engine.device))}"
    )
