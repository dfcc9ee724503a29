"""JSON data as the dataclasses of this room: every value is held to the type of its field."""

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ullage.errors import InputError

_LARGEST = 1 << 63  # of any number: far above every count of bytes, far below a float's end


def decode(kind: Any, data: Any, name: str) -> Any:
    """`data`, as the json module gives it, as a value of the type `kind`: a dataclass (every field
    given and no other), Literal, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``,
    ``dict[str, X]``, or a plain type. No number here counts below zero.

    Raises:
        InputError: a value of another type or beyond its range; `name` leads to it.
    """
    decode_as = _DECODERS.get(get_origin(kind))
    if decode_as is not None:
        return decode_as(get_args(kind), data, name)
    if is_dataclass(kind):
        return _dataclass(kind, data, name)
    return _plain(kind, data, name)


def _dataclass(kind: Any, data: Any, name: str) -> Any:
    values = _mapping(data, name)
    expected = {field.name for field in fields(kind)}
    for key in sorted(expected ^ values.keys()):
        what = "is missing" if key in expected else "is not known"
        raise InputError(f"{name}.{str(key)[:80]} {what}.")
    hints = _hints(kind)
    return kind(**{key: decode(hints[key], values[key], f"{name}.{key}") for key in values})


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    return get_type_hints(kind)


def _literal(choices: tuple[Any, ...], data: Any, name: str) -> Any:
    if data not in choices:
        known = ", ".join(map(str, choices))
        raise InputError(f"{name} is one of {known}, not {_shown(data)}.")
    return data


def _union(kinds: tuple[Any, ...], data: Any, name: str) -> Any:
    kind, none = kinds
    assert none is type(None), "the only unions here are with None"
    return None if data is None else decode(kind, data, name)


def _tuple(kinds: tuple[Any, ...], data: Any, name: str) -> Any:
    if not isinstance(data, list | tuple):
        raise InputError(f"{name} is a list, not {_shown(data)}.")
    if kinds[-1] is Ellipsis:
        kinds = kinds[:1] * len(data)
    if len(kinds) != len(data):
        raise InputError(f"{name} has {len(kinds)} values, not {len(data)}.")
    pairs = enumerate(zip(kinds, data, strict=True))
    return tuple(decode(kind, item, f"{name}[{n}]") for n, (kind, item) in pairs)


def _dict(kinds: tuple[Any, ...], data: Any, name: str) -> Any:
    values = _mapping(data, name)
    return {key: decode(kinds[1], value, f"{name}.{key}") for key, value in values.items()}


_DECODERS: dict[Any, Callable[[tuple[Any, ...], Any, str], Any]] = {
    Literal: _literal,
    UnionType: _union,
    tuple: _tuple,
    dict: _dict,
}


def _plain(kind: Any, data: Any, name: str) -> Any:
    if kind is Any:
        return data
    allowed = (int, float) if kind is float else kind
    if not isinstance(data, allowed) or (isinstance(data, bool) and kind is not bool):
        raise InputError(f"{name} is {_NAMES[kind]}, not {_shown(data)}.")
    # NaN is in no range
    if kind in (int, float) and not 0 <= data < _LARGEST:
        raise InputError(f"{name} is {_shown(data)}: out of range.")
    return data


_NAMES: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


def _mapping(data: Any, name: str) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise InputError(f"{name} is an object, not {_shown(data)}.")
    return data


def _shown(data: Any) -> str:
    """`data` as a message shows it, however large."""
    if isinstance(data, int) and not -_LARGEST < data < _LARGEST:
        return "a number of hundreds of digits" if data.bit_length() > 400 else str(data)
    return repr(data)[:60]
