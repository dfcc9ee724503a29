"""The memory techniques: one paper, one folder. The folder is the registry: adding one is adding a
folder whose ``settings.py`` defines one `Technique`."""

import importlib
import pkgutil
import re
from dataclasses import asdict, fields, replace
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from typing import Any, get_args

from ullage.errors import TechniqueError
from ullage.specs.blocks import BLOCK_TOKENS, full_layers
from ullage.specs.blocks import sequence_blocks as blocks_of_all
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.techniques.base import Technique

__all__ = [
    "Technique",
    "as_typed",
    "choice_of",
    "create",
    "most_tokens",
    "names",
    "parse",
    "sequence_blocks",
    "settled",
]


def names() -> list[str]:
    """The folder names of all techniques. A folder without settings is none yet: nothing of it can
    be chosen."""
    folders = (module.name for module in pkgutil.iter_modules(__path__) if module.ispkg)
    return sorted(name for name in folders if find_spec(f"{__name__}.{name}.settings"))


def create(choice: TechniqueChoice) -> Technique:
    """The technique with its settings; imports its ``settings.py`` and no torch.

    Raises:
        TechniqueError: no such technique, or a setting that it does not take.
    """
    cls = _technique_class(choice.name)
    known = {field.name for field in fields(cls)}
    for key in choice.settings:
        if key not in known:
            raise TechniqueError(f"{choice.name} has no setting {key!r}; {_has(known)}.")
    return cls(**choice.settings)


def choice_of(technique: Technique) -> TechniqueChoice:
    """The technique as data, for a plan."""
    return TechniqueChoice(technique.name, asdict(technique))


def settled(recipe: Recipe) -> Recipe:
    """`recipe` with its techniques settled for its model, workload and execution.

    Raises:
        TechniqueError: a technique that cannot be.
    """
    chosen = tuple(_settled(choice, recipe) for choice in recipe.techniques)
    return recipe if chosen == recipe.techniques else replace(recipe, techniques=chosen)


def _settled(choice: TechniqueChoice, recipe: Recipe) -> TechniqueChoice:
    technique = create(choice)
    made = technique.settled(recipe.model, recipe.workload, recipe.execution)
    return choice if made == technique else choice_of(made)


def sequence_blocks(recipe: Recipe, tokens: int) -> int:
    """Blocks that one sequence of `tokens` takes in all layers, as the recipe's techniques keep
    them."""
    model = recipe.model
    dense = full_layers(model) * model.num_kv_heads * -(-tokens // BLOCK_TOKENS)
    blocks = blocks_of_all(model, tokens)
    for choice in recipe.techniques:
        blocks += create(choice).held_blocks(model, tokens) - dense
    return blocks


def most_tokens(recipe: Recipe) -> int:
    """Tokens of the longest sequence that the recipe's model can read, with its techniques."""
    model = recipe.model
    with_them = (create(choice).most_tokens(model) for choice in recipe.techniques)
    return max(with_them, default=model.max_context_tokens)


def parse(text: str) -> Technique:
    """The technique in ``NAME`` or ``NAME:key=value,key=value``. A comma that no key follows is a
    value's, as in a path.

    Raises:
        TechniqueError: unknown name or setting, one that is given twice, or a value of the wrong
            type.
    """
    name, _, rest = text.partition(":")
    cls = _technique_class(name)
    types: dict[str, Any] = {field.name: field.type for field in fields(cls)}
    settings = {}
    for pair in filter(None, re.split(r",(?=\w*=|$)", rest)):
        key, equals, value = pair.partition("=")
        if not equals:
            raise TechniqueError(
                f"{name}: a setting is name=value, and {pair!r} has no =; {_has(types)}."
            )
        if key not in types:
            raise TechniqueError(f"{name} has no setting {key!r}; {_has(types)}.")
        if key in settings:
            raise TechniqueError(f"{name}: {key} is given twice: once is enough.")
        settings[key] = _cast(name, key, value, types[key])
    return cls(**settings)


def as_typed(choice: TechniqueChoice) -> str:
    """The choice as ``--technique`` and `parse` take it."""
    given = {key: value for key, value in choice.settings.items() if value not in (None, "")}
    settings = ",".join(f"{key}={value}" for key, value in given.items())
    return f"{choice.name}:{settings}" if settings else choice.name


@cache  # a search asks thousands of times
def _technique_class(name: str) -> type[Technique]:
    if name not in names():
        close = get_close_matches(name.lower(), names(), n=1)
        hint = f" Did you mean {close[0]}?" if close else f" There is: {', '.join(names())}."
        raise TechniqueError(f"No technique is called {name!r}.{hint}")
    module = importlib.import_module(f"{__name__}.{name}.settings")
    classes = [
        item
        for item in vars(module).values()
        if isinstance(item, type) and issubclass(item, Technique) and item is not Technique
    ]
    return classes[0]


def _has(known: Any) -> str:
    return f"it has {', '.join(sorted(known))}" if known else "it has none"


def _cast(technique: str, key: str, text: str, kind: Any) -> Any:
    kinds = get_args(kind) or (kind,)  # of `float | None`, float
    if bool in kinds:
        if text.lower() not in {"true", "false"}:
            raise TechniqueError(f"{technique}: {key} is true or false, not {text!r}.")
        return text.lower() == "true"
    number = next((one for one in kinds if one in (int, float)), str)
    try:
        return number(text)
    except ValueError as error:
        what = "a whole number" if number is int else "a number"
        raise TechniqueError(f"{technique}: {key} is {what}, not {text!r}.") from error
