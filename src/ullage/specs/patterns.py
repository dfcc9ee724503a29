"""Names of modules, as the settings of quantized checkpoints write them."""

import re
from collections.abc import Iterable

from ullage.errors import ModelError

_MOST_REPETITIONS = 4  # in one pattern: each more takes tens of times longer


class Patterns:
    """Names of modules as quantization configs write them: ``re:`` begins a regular expression,
    ``*`` stands for anything, and a bare name for itself, the modules inside it and all whose last
    parts it is. Wrapped models' names count with and without what the wrapper puts before them."""

    def __init__(self, written: Iterable[str]) -> None:
        bare, loose = set(), []
        for pattern in written:
            _refuse_slow(pattern)
            if pattern.startswith("re:"):
                loose.append(f"(?:{pattern[3:]})")
            elif "*" in pattern:
                loose.append(re.escape(pattern).replace(r"\*", ".*") + r"\Z")
            else:
                bare.add(_text_name(pattern))
        self._bare = bare
        try:
            self._loose = re.compile("|".join(loose)) if loose else None
        except (re.error, RecursionError, OverflowError) as error:
            raise ModelError(
                f"The model's quantization_config has a garbled pattern ({str(error)[:60]})."
            ) from error

    def matches(self, module: str) -> bool:
        """Whether one of them stands for `module`."""
        parts = module.split(".")
        if self._bare and any(
            ".".join(some) in self._bare
            for at in range(len(parts))
            for some in (parts[: at + 1], parts[at:])
        ):
            return True
        loose = self._loose
        return loose is not None and any(loose.match(name) for name in _spellings(module))


def _refuse_slow(pattern: str) -> None:
    """A repeated group, or many repetitions, can take for ever: no real pattern has them."""
    # a "?" that makes something optional, and does not open a group or shorten a repetition
    repeated = len(re.findall(r"[*+{]|(?<![(*+}])\?", pattern))
    if re.search(r"\)[*+{]", pattern) or repeated > _MOST_REPETITIONS or len(pattern) > 1000:
        raise ModelError(f"The model's quantization_config has the odd pattern {pattern[:60]!r}.")


def _text_name(name: str) -> str:
    """A module's name in the text model alone."""
    name = name.removeprefix("language_model.")
    inner = name.removeprefix("model.language_model.")
    return name if inner == name else f"model.{inner}"


def _spellings(module: str) -> tuple[str, ...]:
    inside = module.removeprefix("model.")
    return module, f"language_model.{module}", f"model.language_model.{inside}"
