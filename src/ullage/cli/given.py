"""What ullage run is given: a prompt, how to go on from it, perhaps a plan; refused early."""

import sys
from dataclasses import replace
from pathlib import Path

from ullage import techniques
from ullage.cli.asked import PlanOptions
from ullage.cli.options import NamedRecipe
from ullage.errors import InputError, PromptError
from ullage.planner.engines import ENGINES
from ullage.specs.dtypes import kv_dtype_name
from ullage.specs.model import ModelSpec
from ullage.specs.plan import Plan
from ullage.specs.saved import SavedText
from ullage.techniques.larimar.settings import Larimar


def prompt_text(source: str | None, prompt: str | None, file: Path | None) -> str:
    """The prompt from the one place that was named.

    Raises:
        PromptError: none or more than one was, the file cannot be read, or it is empty.
    """
    if source not in (None, "-"):
        raise PromptError(f"Give the prompt with --prompt; {source!r} is not an option.")
    given = [place for place in (source, prompt, file) if place is not None]
    if len(given) != 1:
        raise PromptError("Give one prompt: --prompt TEXT, --prompt-file FILE, or - for stdin.")
    text = _read("prompt", file) if prompt is None else prompt
    return _whole("prompt", text, "to go on from")


def document_text(doc: str) -> str:
    """The text in the file `doc`, or, with -, of stdin.

    Raises:
        PromptError: the file cannot be read, or it is empty.
    """
    return _whole("text", _read("text", None if doc == "-" else Path(doc)), "to read")


def _read(called: str, file: Path | None) -> str:
    """The file, or stdin, of what is `called` so."""
    if file is None and sys.stdin is None:
        raise PromptError(f"There is no stdin to read the {called} from.")
    try:
        if file is not None:
            return file.read_text(encoding="utf-8")
        with open(0, encoding="utf-8", closefd=False) as stdin:  # whatever the locale says
            return stdin.read()
    except OSError as error:
        raise PromptError(
            f"Cannot read the {called} from {file or 'stdin'}: {error.strerror}."
        ) from error
    except UnicodeError as error:
        raise _no_utf8(f"{called} from {file or 'stdin'}", error) from error


def _whole(called: str, text: str, use: str) -> str:
    try:
        text.encode()  # bytes of the command line that are no UTF-8 come as lone surrogates
    except UnicodeError as error:
        raise _no_utf8(called, error) from error
    if not text.strip():
        raise PromptError(f"The {called} is empty or only blank: there is nothing {use}.")
    return text


def _no_utf8(called: str, error: UnicodeError) -> PromptError:
    return PromptError(f"Cannot read the {called} as UTF-8 text: {error}.")


def refuse_beside_plan(
    options: PlanOptions,
    recipe: NamedRecipe | None,
    bank: Path | None,
    facts: Path | None,
) -> None:
    """`options` as they were typed, without what `recipe` stands for.

    Raises:
        InputError: an option that the plan decides. --memory and --calibration only say what it is
            held against.
    """
    given = {
        "--device": options.device,
        "--weights": options.weights,
        "--kv-cache-dtype": options.kv_cache_dtype,
        "--prefill-chunk": options.prefill_chunk,
        "--technique": options.technique or None,
        "--recipe": recipe,
        "--bank": bank,
        "--facts": facts,
    }
    for option, value in given.items():
        if value is not None:
            raise InputError(f"{option} and --plan: the plan decides that. Leave one out.")


def refuse_plan(plan: Plan, spec: ModelSpec) -> None:
    """
    Raises:
        InputError: a plan of another model, or of what ullage's own engine does not do.
    """
    model, execution = plan.recipe.model, plan.recipe.execution
    if execution.engine != "ullage":
        raise InputError(f"The plan is for {execution.engine}: ullage runs its own alone.")
    if execution.attention != "sdpa":
        raise InputError(own_attention("The plan's attention", execution.attention))
    if execution.kv_dtype not in ENGINES["ullage"].kv_dtypes:
        raise InputError(f"The plan's KV entries are {execution.kv_dtype}: ullage has no such.")
    if replace(model, source="") != replace(spec, source=""):
        raise InputError(f"The plan is for {model.name}, not this model.")


def options_behind(bank: SavedText, options: PlanOptions) -> PlanOptions:
    """`options` as they were typed, and how what was read before is kept.

    Raises:
        InputError: an option that says something else.
    """
    record = bank.record
    others = []
    for text in options.technique:
        technique = techniques.parse(text)
        if technique.acts_on not in ("kv", "context"):
            others.append(text)
        elif techniques.as_typed(techniques.choice_of(technique)) != record.technique:
            raise InputError(_decided(f"--technique {text}", bank, record.technique))
    asked = options.kv_cache_dtype
    if asked not in (None, "auto") and kv_dtype_name(asked) != record.kv_dtype:
        raise InputError(_decided(f"--kv-cache-dtype {asked}", bank, record.kv_dtype))
    chosen = (*others, record.technique)
    return replace(options, technique=chosen, kv_cache_dtype=record.kv_dtype)


def options_knowing(facts: Path, options: PlanOptions) -> PlanOptions:
    """`options`, and the facts of the ledger at `facts`.

    Raises:
        TechniqueError: there is no ledger.
    """
    chosen = techniques.as_typed(techniques.choice_of(Larimar(str(facts))))
    return replace(options, technique=(*options.technique, chosen))


def _decided(option: str, bank: SavedText, kept: str) -> str:
    return f"{option} and --bank: {bank.path} was read with {kept}. Leave the option out."


def refuse_bank(bank: SavedText, spec: ModelSpec) -> None:
    """
    Raises:
        InputError: a bank of another model, as far as its shape says.
    """
    reason = bank.record.unsuited(spec)
    if reason is not None:
        raise bank.unfit(reason)


def own_attention(what: str, attention: str) -> str:
    """Why `what` cannot have that attention."""
    return (
        f"{what} {attention}: ullage run has kernels of its own, which never build the score "
        "matrix and are planned as sdpa."
    )
