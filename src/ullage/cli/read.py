"""ullage read: a long text once, so that many questions can be asked of it."""

import hashlib
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
from ullage.cli.given import document_text
from ullage.cli.options import (
    CalibrationOption,
    ChunkOption,
    DeviceOption,
    KvOption,
    MemoryOption,
    ModelArgument,
    TechniqueOption,
    WeightsOption,
)
from ullage.cli.session import Session, peaks, progress_bar
from ullage.cli.written import refuse_unwritable
from ullage.errors import InputError
from ullage.runtime import out_of_memory
from ullage.runtime.checkpoint import refuse_planned_only
from ullage.specs.sources import resolve
from ullage.techniques.camelot.settings import CAMELoT
from ullage.units import format_bytes

if TYPE_CHECKING:
    from ullage.runtime.engine import Engine

_DEFAULT = ("camelot",)
_NEW_TOKENS = 1  # of a plan, at least


def read(
    model: ModelArgument,
    doc: Annotated[
        str,
        typer.Argument(
            metavar="DOC", help="A text file, or - to read the text from stdin.", show_default=False
        ),
    ],
    save: Annotated[
        Path,
        typer.Option(metavar="BANK", help="The file to keep it in.", show_default=False),
    ],
    memory: MemoryOption = None,
    device: DeviceOption = None,
    weights: WeightsOption = None,
    kv_cache_dtype: KvOption = None,
    prefill_chunk: ChunkOption = None,
    technique: TechniqueOption = None,
    calibration: CalibrationOption = None,
) -> None:
    """Read a text of any length once, in constant memory, and keep what the model holds of it, for
    `ullage run MODEL --bank BANK`.

    It is read with the technique camelot, whose settings the bank keeps, inside a byte budget that
    nothing exceeds.
    """
    options = PlanOptions(
        device, memory, weights, kv_cache_dtype, None, prefill_chunk,
        tuple(technique or _DEFAULT), calibration=calibration,
    )  # fmt: skip
    _refuse_bankless(options.technique)
    _refuse_no_place(doc, save)
    refuse_unwritable(save)
    spec = resolve(model)
    refuse_planned_only(spec)
    text = document_text(doc)
    session = Session(spec, options, called="text")
    session.refuse_early(text, _NEW_TOKENS)
    ids = session.tokenize(text)
    plan = session.plan_for(len(ids), _NEW_TOKENS)
    name = "stdin" if doc == "-" else Path(doc).name
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    with out_of_memory.explained():
        engine = session.load(plan)
        with closing(engine.loaded):
            _read(engine, ids, save, name, sha256)


def _refuse_bankless(typed: tuple[str, ...]) -> None:
    chosen = [techniques.parse(text) for text in typed]
    banks = [technique for technique in chosen if isinstance(technique, CAMELoT)]
    if not banks:
        raise InputError(
            "A text is kept in banks, which camelot has: add --technique camelot, or name none."
        )
    if not banks[0].slots:
        raise InputError("camelot:slots=0 has no bank to keep a text in: leave slots=0 out.")


def _refuse_no_place(doc: str, save: Path) -> None:
    if save.exists() and not save.is_file():
        raise InputError(f"--save {save} is no file: a bank is kept in one.")
    if doc != "-" and save.exists() and Path(doc).exists() and save.samefile(doc):
        raise InputError(f"--save {save} would overwrite the text: name another file.")


def _read(engine: "Engine", ids: list[int], save: Path, name: str, sha256: str) -> None:
    from ullage.runtime import banks
    from ullage.runtime.memory import peak_bytes

    start_s = time.perf_counter()
    with progress_bar(f"reading {escape(name)}", MofNCompleteColumn(), len(ids)) as progress:
        task = progress.add_task("", total=len(ids))
        with engine.reading(
            ids, on_prefill=lambda done, _: progress.update(task, completed=done)
        ) as sequence:
            read_s = time.perf_counter() - start_s
            try:
                banks.save(sequence, engine, save, name, sha256)
            except OSError as error:
                raise InputError(f"Cannot write {save}: {error.strerror}.") from error
    Console(stderr=True, highlight=False, soft_wrap=True).print(
        escape(
            f"{len(ids):,} tokens of {name} read in {read_s:.1f} s; "
            f"{peaks(engine.plan, peak_bytes(engine.device))}; {save} has "
            f"{format_bytes(save.stat().st_size)}"
        )
    )
