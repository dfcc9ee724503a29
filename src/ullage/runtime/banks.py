"""A text that a model read with a bank, in a file for later: with what tells whom it is good for.

with engine.reading(ids) as manual:
    save(manual, engine, Path("manual.bank"), "manual.txt", sha256)

start = saved_start(read_saved(Path("manual.bank")), engine)  # on another day
answer = list(engine.generate(Request(question_ids, 50, start=start)))
"""

import json
from pathlib import Path

from ullage import techniques
from ullage.kv.cache import Sequence
from ullage.kv.fingerprint import fingerprint
from ullage.kv.saved import FromFile, write
from ullage.runtime.engine import Engine
from ullage.specs.plan import Recipe
from ullage.specs.saved import Record, SavedText


def save(
    sequence: Sequence, engine: Engine, path: Path, document: str, document_sha256: str
) -> None:
    """Write what `engine` holds of a text to `path`, whole or not at all.

    Raises:
        TechniqueError: it was not read with a bank.
    """
    recipe = engine.plan.recipe
    model = recipe.model
    record = Record(
        model=model.name,
        layers=model.num_layers,
        kv_heads=model.num_kv_heads,
        head_dim=model.head_dim,
        fingerprint=fingerprint(engine.loaded.model),
        rotation=_rotation_of(engine),
        technique=_memory_of(recipe),
        kv_dtype=recipe.execution.kv_dtype,
        tokens=sequence.length,
        max_tokens=engine.loaded.max_tokens,
        document=document,
        document_sha256=document_sha256,
    )
    write(path, record, sequence)


def saved_start(saved: SavedText, engine: Engine) -> FromFile:
    """What a request of `engine` can start with. That the file is whole shows when one does.

    Raises:
        InputError: it was read by another model, with other settings or rotary frequencies, or into
            another KV format.
    """
    record, recipe = saved.record, engine.plan.recipe
    reason = record.unsuited(recipe.model)
    if reason is None and record.fingerprint != fingerprint(engine.loaded.model):
        reason = f"it is of {record.model}, whose weights are not those of {recipe.model.name}."
    if reason is None and record.rotation != _rotation_of(engine):
        reason = f"it is of {record.model} as it turned keys by {record.rotation}."
    if reason is None and record.technique != _memory_of(recipe):
        reason = f"it was read with {record.technique}, not with {_memory_of(recipe) or 'none'}."
    if reason is None and record.kv_dtype != recipe.execution.kv_dtype:
        reason = f"its entries are {record.kv_dtype}, not {recipe.execution.kv_dtype}."
    if reason is None and record.max_tokens != engine.loaded.max_tokens:
        reason = _other_frequencies(record, engine)
    if reason is not None:
        raise saved.unfit(reason)
    return FromFile(saved)


def _other_frequencies(record: Record, engine: Engine) -> str:
    """Keys that are turned already would stand askew to those that come."""
    limit, way_out = record.max_tokens, "ask for fewer new tokens"
    if limit is None:
        limit, way_out = engine.loaded.max_tokens, "plan for more"
    return (
        f"{record.model} turns sequences of more than {limit:,} tokens, read and written, by other "
        f"rotary frequencies than shorter ones: {way_out}."
    )


def _rotation_of(engine: Engine) -> str:
    """The model's rotary settings in JSON: 1 and 1.0 are the same."""
    config = engine.loaded.model.config.get_text_config()
    told = json.dumps(getattr(config, "rope_parameters", None))
    return json.dumps(json.loads(told, parse_int=float), sort_keys=True)


def _memory_of(recipe: Recipe) -> str:
    """The technique that keeps entries, as it is typed, with all that it settles itself."""
    made = (techniques.create(choice) for choice in recipe.techniques)
    keeping = (techniques.choice_of(one) for one in made if one.rows(recipe.model))
    return next(map(techniques.as_typed, keeping), "")
