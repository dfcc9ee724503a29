"""A log that nobody can be sure of: read in a bounded way, cleaned, and searched."""

import re
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import BinaryIO

from ullage.errors import InputError

MOST_BYTES = 200 * 10**6
_LONGEST_LINE_BYTES = 16_000  # vLLM prints its whole configuration in a line of 6,000
_BLOCK_BYTES = 1 << 16
_MOST_KEPT = 5_000  # from the start, and as many from the end
# A message that a terminal has wrapped goes on in the next lines; a traceback's head is before.
_LINES_BEFORE, _LINES_AFTER, _WRAPPED_CHARS = 2, 3, 400  # the line itself is one of two

_ESCAPES = re.compile(r"\x1b\][^\x07\x1b]*\x07?|\x1b?\[[0-9;]*m|\x1b\[[0-9;?]*[ -/]*[@-~]")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\s\ufffd]+")
# What loggers, containers and journals put before a message. It would stand in the middle of a
# message that goes on in the next line.
_PREFIX = re.compile(
    r"(?:\([A-Za-z][^()]*(?:\(\d+\))?[^()]*pid=\d+[^()]*\) ?"  # (EngineCore pid=248), Ray's too
    r"|(?:DEBUG|INFO|WARNING|ERROR) [\d-]+ [\d:]+ \[[^\]]*\] ?"  # vLLM
    r"|\[\d{4}-\d\d-\d\d[T ][^\]]*\] ?"  # SGLang
    r"|\d{4}-\d\d-\d\dT[\d:.]+Z?(?:[+-]\d\d:\d\d)? "  # containers
    r"|[A-Z][a-z]{2} +\d+ [\d:]{8} \S+ [\w.-]+\[\d+\]: "  # journals
    r"|[\w.-]{1,40} +\| "  # docker compose
    r"|\[ *\d+\.\d+\] )"  # dmesg
)
_NUMBER = r"\d{1,15}(?:\.\d{1,12})?"
_SIZE = rf"{_NUMBER} ?(?:[KMGTk]i?B|bytes|B)\b"


@dataclass(frozen=True)
class Line:
    """A line's number in the log, from 1, and its text without colours and control characters."""

    number: int
    text: str


@dataclass(frozen=True)
class Found:
    """A pattern that was found, and the line that it starts in."""

    line: Line
    match: re.Match[str]

    def text(self, name: str) -> str:
        """The text of the group `name`; "" when the log leaves it out."""
        return self.match[name] or ""

    def size(self, name: str) -> int:
        """Bytes of the group `name`. Engines write GB for 2^30 bytes, and kernels kB for 1,024."""
        number = self.match[name].rstrip("bBiytes KkMGT")
        unit = self.match[name][len(number) :].strip().lower()
        factor: int = 1024 ** "bkmgt".index(unit[:1])
        return round(float(number) * factor)

    def number(self, name: str) -> float:
        """The number in the group `name`."""
        return float(self.match[name])

    def count(self, name: str) -> int:
        """The whole number in the group `name`."""
        return int(self.match[name].replace(",", ""))


class Log:
    """The lines of a log that are worth a look."""

    def __init__(self, lines: list[Line]) -> None:
        self.lines = lines

    @cached_property
    def _windows(self) -> list[tuple[Line, str]]:
        """Each line with what follows it directly, joined as if nothing had wrapped it."""
        windows = []
        for index, line in enumerate(self.lines):
            after = self.lines[index + 1 : index + 1 + _LINES_AFTER]
            joined = [
                _PREFIX.sub("", other.text)[:_WRAPPED_CHARS]
                for step, other in enumerate(after, 1)
                if other.number == line.number + step
            ]
            windows.append((line, line.text + "".join(joined)))
        return windows

    @cached_property
    def _all(self) -> str:
        """Every text that a pattern may be found in."""
        return "\n".join(f"{line.text}\n{window}" for line, window in self._windows)

    def every(self, pattern: str) -> Iterator[Found]:
        """Where `pattern` is found, in order.

        It is a regular expression in which a space stands for any blanks or none, ``{free}`` for a
        size that is called free, ``{left-}`` for one that may be negative, ``{rows#}`` for a whole
        number and ``{times%}`` for any number.
        """
        compiled = _compiled(pattern)
        if compiled.search(self._all) is None:  # most are not: one search instead of many
            return
        for line, window in self._windows:
            match = _fuller(compiled.search(line.text), compiled.search(window))
            if match is not None and match.start() < len(line.text):
                yield Found(line, match)

    def first(self, *patterns: str) -> Found | None:
        """The first place of the first pattern that is found at all."""
        return next((found for pattern in patterns for found in self.every(pattern)), None)

    def last(self, *patterns: str) -> Found | None:
        """The last place of the first pattern that is found at all."""
        for pattern in patterns:
            places = deque(self.every(pattern), maxlen=1)
            if places:
                return places[0]
        return None

    def word(self, *patterns: str) -> str:
        """The group ``word`` of the last place; "" where there is none, or it is None or auto."""
        found = self.last(*patterns)
        word = "" if found is None else found.text("word").strip()
        return "" if word in ("None", "auto") else word

    def count(self, *patterns: str) -> int | None:
        """The positive number ``{n#}`` of the last place, or None."""
        found = self.last(*patterns)
        return None if found is None else found.count("n") or None

    def share(self, *patterns: str) -> float | None:
        """The group ``share`` of the last place, above 0, or None."""
        found = self.last(*patterns)
        return None if found is None else found.number("share") or None


def _fuller(alone: re.Match[str] | None, joined: re.Match[str] | None) -> re.Match[str] | None:
    """The match in the line alone, unless more of the message is found with the lines after."""
    if alone is None or joined is None:
        return alone or joined
    missing = [match.groups().count(None) for match in (alone, joined)]
    return joined if missing[1] < missing[0] else alone


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    kinds = {"": _SIZE, "-": f"-?{_SIZE}", "%": _NUMBER, "#": r"\d{1,3}(?:,\d{3}){1,5}\b|\d{1,15}"}
    named = re.sub(
        r"\{([a-z_]+)([#%-]?)\}", lambda match: f"(?P<{match[1]}>{kinds[match[2]]})", pattern
    )
    return re.compile(named.replace(" ", r"\s*"), re.MULTILINE)


def read_log(path: Path | None, words: Iterable[str]) -> Log:
    """The lines that have one of `words`, and their neighbours. None reads standard input.

    Raises:
        InputError: it cannot be read, or is larger than 200 MB.
    """
    wanted = tuple(word.encode() for word in words)
    if path is None:
        return Log(_kept(sys.stdin.buffer, wanted))
    try:
        with path.open("rb") as file:
            return Log(_kept(file, wanted))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"Cannot read the log {str(path)[:200]}: {reason}.") from error


def _kept(file: BinaryIO, words: tuple[bytes, ...]) -> list[Line]:
    head: list[Line] = []
    tail: deque[Line] = deque(maxlen=_MOST_KEPT)
    before: deque[tuple[int, bytes]] = deque(maxlen=_LINES_BEFORE)
    after = 0
    for number, raw, chosen in _lines(file, words):
        after = _LINES_AFTER if chosen else after - 1
        before.append((number, raw))
        if not chosen and after < 0:
            continue
        for kept in before:
            (head if len(head) < _MOST_KEPT else tail).append(Line(kept[0], _clean(kept[1])))
        before.clear()
    return [*head, *tail]


def _lines(file: BinaryIO, words: tuple[bytes, ...]) -> Iterator[tuple[int, bytes, bool]]:
    """Lines with their numbers, and whether they have one of `words`."""
    number = 0
    for lines in _blocks(file):
        block = b"\n".join(lines)
        there = [word for word in words if word in block]
        for raw in lines:
            number += 1
            yield number, raw, any(word in raw for word in there)


def _blocks(file: BinaryIO) -> Iterator[list[bytes]]:
    """Lines, some hundreds at a time. UTF-16 of plain English is read by dropping its zeros."""
    read_bytes, rest = 0, b""
    while chunk := file.read(_BLOCK_BYTES):
        read_bytes += len(chunk)
        if read_bytes > MOST_BYTES:
            raise InputError(
                f"The log is larger than {MOST_BYTES // 10**6} MB. Its last part will do: "
                f"`tail -c 100M LOG | ullage doctor -`."
            )
        lines = (rest + chunk.replace(b"\0", b"")).split(b"\n")
        rest = lines.pop()[:_LONGEST_LINE_BYTES]
        yield lines
    if rest:
        yield [rest]


def _clean(raw: bytes) -> str:
    """Without escapes and control characters."""
    text = _ESCAPES.sub("", raw[:_LONGEST_LINE_BYTES].decode("utf-8", "replace"))
    return _CONTROL.sub(" ", text).strip()
