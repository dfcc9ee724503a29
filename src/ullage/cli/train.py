"""ullage train: what a technique has to know of a model, from texts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from ullage.cli.machine import device_to_run
from ullage.cli.options import DeviceOption, ModelArgument, PlanOptions
from ullage.cli.written import refuse_unwritable
from ullage.errors import InputError
from ullage.measure.quality.texts import read_training_texts
from ullage.planner import build_plan
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only, weights_folder
from ullage.specs.plan import Plan
from ullage.specs.sources import resolve
from ullage.specs.workload import Workload
from ullage.techniques.dms.adapter import Adapter, look_back
from ullage.units import parse_tokens

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

_TOKENS = 8192


def train(
    technique: Annotated[Literal["dms"], typer.Argument(help="The technique.")],
    model: ModelArgument,
    data: Annotated[
        Path,
        typer.Option(
            metavar="DIR",
            help="Texts: its .txt files, and those in its folder books, but none to test with.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option(metavar="FILE", help="The adapter.")] = Path(
        "dms.safetensors"
    ),
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="TOKENS",
            help="Length of a piece: 4096, 8K. Default: what the model reads, 8192 at most.",
        ),
    ] = None,
    pieces: Annotated[int, typer.Option(min=1, help="Pieces of text, from all files in turn.")] = 6,
    device: DeviceOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="What was found as JSON.")] = False,
) -> None:
    """Measure how far back each KV head of a model has to look, for `dms:adapter=FILE`.

    Reads each piece once, forward and back; nothing is trained by steps. A minute or two a piece
    of 8,192 tokens on a small model and two cores.
    """
    refuse_unwritable(output)
    spec = resolve(model)
    refuse_planned_only(spec)
    length = parse_tokens(tokens) if tokens else min(_TOKENS, spec.max_context_tokens)
    if length > spec.max_context_tokens:
        raise InputError(
            f"--tokens {length:,}: {spec.name} reads {spec.max_context_tokens:,} at most."
        )
    texts = read_training_texts(data)
    work = Workload(length - 1, 1)
    plan = build_plan(PlanOptions(device).recipe(spec, device_to_run(device), work))
    adapter = _measured(plan, texts, length, pieces)
    adapter.save(output)
    if as_json:
        typer.echo(json.dumps(adapter.record | {"windows": adapter.windows}, indent=2))
    else:
        _show(adapter, spec.max_context_tokens)
    Console(stderr=True, highlight=False).print(
        escape(f"Adapter in {output}; use it by `--technique dms:adapter={output},window=TOKENS`.")
    )


def _measured(plan: Plan, texts: dict[str, str], length: int, count: int) -> Adapter:
    from ullage.runtime.load import load_model, load_tokenizer
    from ullage.techniques.dms.measure import measure

    folder = weights_folder(plan.recipe.model)
    with out_of_memory.explained():
        loaded = load_model(plan, folder, load_tokenizer(folder))
        chosen = _pieces(texts, loaded.tokenizer, length, count)
        record = {
            "model": plan.recipe.model.name,
            "tokens": length,
            "pieces": [name for name, _ in chosen],
        }
        console = Console(stderr=True)
        ids = (ids for _, ids in chosen)
        shown = track(ids, "reading", total=len(chosen), console=console, transient=True)
        return measure(loaded.model, shown, record)


def _pieces(
    texts: dict[str, str], tokenizer: "PreTrainedTokenizerBase", length: int, count: int
) -> "list[tuple[str, torch.Tensor]]":
    """`count` pieces, a file's first, then the next file's, and so on: names and ids [T]."""
    found: list[tuple[str, torch.Tensor]] = []
    ids = {
        name: tokenizer(text, return_tensors="pt", verbose=False).input_ids[0]
        for name, text in texts.items()
    }
    most = max(len(one) // length for one in ids.values())
    for number in range(most):
        for name, one in ids.items():
            piece = one[number * length : (number + 1) * length]
            if len(piece) == length and len(found) < count:
                found.append((f"{name}:{number}", piece))
    if not found:
        raise InputError(f"No text is {length:,} tokens long: ask for fewer with --tokens.")
    return found


def _show(adapter: Adapter, context: int) -> None:
    """How the heads share a window out, for some averages."""
    table = Table("window", "heads see least", "half of them at most", "most", box=None)
    for share in (2, 4, 8):
        average = context // share
        if average >= adapter.windows[0]:
            heads = sorted(size for layer in look_back(adapter, average, context) for size in layer)
            sizes = (heads[0], heads[len(heads) // 2], heads[-1])
            table.add_row(f"{average:,}", *(f"{size:,}" for size in sizes))
    Console(highlight=False).print(table)
