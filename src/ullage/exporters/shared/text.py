"""Text that a shell, YAML or Python reads as it was meant, whatever a model is called."""

import json
import re
import shlex
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ullage.errors import InputError
from ullage.exporters.shared.options import Option

# Strings that YAML takes as themselves without quotes.
_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9_]*(?:[-./][A-Za-z0-9_]+)*", re.ASCII)
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


@dataclass(frozen=True)
class Noted:
    """A YAML value with the reason why it is what it is, on one line or several."""

    value: Any
    why: str


def writable(text: str, what: str) -> str:
    """`text`, which may hold anything that can be seen, and newlines and tabs.

    Raises:
        InputError: control or other invisible characters, which no quoting makes safe to paste.
    """
    for character in text:
        category = unicodedata.category(character)
        if character not in "\n\t" and (category[0] == "C" or category in ("Zl", "Zp")):
            raise InputError(f"The {what} holds the character {character!a}: give it another.")
    return text


def comments(lines: Iterable[str], indent: int = 0) -> list[str]:
    """`lines` as comments, each on one line: what cannot be seen is escaped, so that no name ends
    a comment."""
    return [f"{' ' * indent}# {_visible(line)}" for line in lines]


def shell(
    notes: Iterable[str],
    environment: Sequence[Option],
    command: Sequence[str],
    options: Sequence[Option],
) -> str:
    """A command for bash, one option a line. All comments stand above it: a comment between
    continued lines would end the command."""
    reasons = [f"{_words_of(option)}: {option.why}" for option in (*environment, *options)]
    variables = [f"{variable.name}={variable.value}" for variable in environment]
    lines = [
        shlex.join((*variables, *command)),
        *(shlex.join(_argv(option)) for option in options),
    ]
    return "\n".join((*comments(notes), *comments(reasons), " \\\n  ".join(lines))) + "\n"


def flags(options: Iterable[Option]) -> str:
    """`options` on one line, quoted as a shell wants it."""
    return shlex.join(word for option in options for word in _argv(option))


def python(text: str) -> str:
    """`text` as a string of Python, whose escapes are JSON's."""
    return json.dumps(text, ensure_ascii=False)


def yaml(notes: Iterable[str], document: Mapping[str, Any]) -> str:
    """A YAML document under its notes."""
    return "\n".join((*comments(notes), *_yaml_map(document, 0))) + "\n"


def _argv(option: Option) -> list[str]:
    return [option.name] if option.value is None else [option.name, str(option.value)]


def _words_of(option: Option) -> str:
    return option.name if option.value is None else f"{option.name} {option.value}"


def _visible(text: str) -> str:
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def _yaml_map(node: Mapping[str, Any], indent: int) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, Noted):
            yield from comments(value.why.split("\n"), indent)
            value = value.value
        if isinstance(value, Mapping | list) and value:
            yield f"{' ' * indent}{key}:"
            yield from _yaml_block(value, indent + 2)
        else:
            yield f"{' ' * indent}{key}: {_yaml_scalar(value)}"


def _yaml_block(node: Mapping[str, Any] | list[Any], indent: int) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from _yaml_map(node, indent)
        return
    for item in node:
        lines = list(_yaml_map(item, indent + 2))
        yield f"{' ' * indent}- {lines[0].lstrip()}"
        yield from lines[1:]


def _yaml_scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and value.lower() not in _YAML_WORDS:
        return value
    # JSON is YAML. Characters stay themselves: YAML does not join JSON's escaped surrogates.
    return json.dumps(value, ensure_ascii=False)
