"""A fact, as it is written down. No torch."""

import json
import unicodedata
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ullage.errors import FactError
from ullage.techniques.larimar.subject import WORD, find_subject, folded, relation, split, stands_in

LIMIT_CHARACTERS = 1000  # some 250 tokens, and no more are kept of a fact
_NAMES = ("text", "subject", "prompt", "answer")


@dataclass(frozen=True)
class Fact:
    """A sentence, what it is about, and, where they are known, what its `answer` follows: `prompt`.

    `make` is how one comes to be from what a user says.
    """

    text: str
    subject: str
    prompt: str = ""
    answer: str = ""

    @classmethod
    def make(
        cls,
        text: str | None = None,
        subject: str | None = None,
        prompt: str | None = None,
        answer: str | None = None,
    ) -> Self:
        """A fact from its text, or from prompt and answer; the subject, if it is not given, is
        found: never in the answer, which a question does not hold.

        Raises:
            FactError: it is empty, too long, not text, or has no subject.
        """
        text, subject, prompt, answer = map(plain, (text, subject, prompt, answer))
        if bool(prompt) != bool(answer):
            raise FactError(
                "A prompt needs an answer, and an answer a prompt; or give a text alone."
            )
        if prompt and text and folded(f"{prompt} {answer}") != folded(text):
            raise FactError(
                f'"{_short(text)}" is not its prompt and then its answer: leave it out.'
            )
        text = text or f"{prompt} {answer}".strip()
        if not folded(text):
            raise FactError("The fact is empty: there is nothing to write.")
        if len(text) > LIMIT_CHARACTERS:
            raise FactError(
                f"The fact has {len(text):,} characters, and the limit is {LIMIT_CHARACTERS:,}: "
                "write it as several."
            )
        if not prompt and (parts := split(text, subject or None)):
            return cls(text, *parts)
        about = subject or find_subject(prompt or text) or ""
        _refuse_subject(about, prompt or text)
        return cls(text, about, prompt, answer)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Back from `content`, as it was written."""
        return cls(**json.loads(text))

    def edited(
        self, text: str | None = None, answer: str | None = None, subject: str | None = None
    ) -> Self:
        """What this becomes: a text, about the same where that still stands in it; or another
        answer to its prompt; or the same about another subject. Raises what `make` does."""
        if text is not None and answer is not None:
            raise FactError("A text and an answer are both given: leave one out.")
        if text is None and answer is None:
            if not subject:
                raise FactError("Give what the fact becomes: its text, its answer or its subject.")
            return self.make(self.text, subject, self.prompt, self.answer)
        if text is not None:
            answer = self._answer_in(plain(text))
            if not answer:
                still = self.subject if stands_in(self.subject, text) else None
                return self.make(text, subject or still)
        if not self.prompt:
            raise FactError(f'"{_short(self.text)}" shows no prompt that an answer follows.')
        if not plain(answer):
            raise FactError("The new answer is empty: forget the fact if it is to stand no longer.")
        return self.make(None, subject or self.subject, self.prompt, answer)

    def _answer_in(self, text: str) -> str:
        """What `text` says behind this prompt; nothing where that does not begin it."""
        said, rest = text[: len(self.prompt)], text[len(self.prompt) :]
        begins = self.prompt and rest.startswith(" ") and folded(said) == folded(self.prompt)
        return rest.strip().rstrip(" .!") if begins else ""

    @cached_property
    def content(self) -> str:
        """The one JSON that this fact has."""
        return json.dumps(asdict(self), ensure_ascii=False, separators=(",", ":"), sort_keys=True)

    @property
    def asks(self) -> str:
        """What two facts have in common that cannot both stand, unless they say the same: subject
        and relation. Of a fact whose answer is not known, all that it says."""
        if not self.answer:
            return folded(self.text)
        return f"{folded(self.subject)}\n{relation(self.prompt, self.subject)}"

    def says(self, other: Self) -> bool:
        """Whether `other`, which asks the same, has the same answer."""
        return folded(self.answer) == folded(other.answer)


def plain(text: str | None) -> str:
    """`text` with one blank where there are several, or a new line.

    Raises:
        FactError: it holds what is no text, such as what steers a terminal.
    """
    words = " ".join((text or "").split())
    for letter in words:
        # lone surrogates stand for bytes of the command line that are no UTF-8
        if unicodedata.category(letter) in ("Cc", "Cs"):
            raise FactError(f"U+{ord(letter):04X} is no text: leave it out.")
    return words


def read_facts(file: Path) -> list[Fact]:
    """The facts of a JSON Lines file: a line an object of `text`, or of `prompt` and `answer`,
    and perhaps a `subject`. Lines of CounterFact do, whose answer is `target_new`.

    Raises:
        FactError: it cannot be read, or a line is no fact, or contradicts another; says which.
    """
    facts, asked = [], dict[str, tuple[int, Fact]]()
    try:
        with file.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    fact = _from_line(line, f"{file}, line {number}")
                    before, other = asked.setdefault(fact.asks, (number, fact))
                    if not fact.says(other):
                        raise FactError(
                            f"{file}, line {number} contradicts line {before}, "
                            f'"{_short(other.text)}": leave one out.'
                        )
                    facts.append(fact)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise FactError(f"Cannot read {file} as UTF-8 text: {reason}.") from error
    if not facts:
        raise FactError(f"{file} is empty: there is nothing to write.")
    return facts


def _from_line(line: str, where: str) -> Fact:
    try:
        given = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise FactError(f"{where} is not JSON ({str(error)[:80]}).") from error
    if not isinstance(given, dict):
        raise FactError(f"{where} is no JSON object: write a fact a line, as in " + _EXAMPLE)
    if "target_new" in given:
        given = {"prompt": given.get("prompt"), "answer": given["target_new"]} | {
            name: given[name] for name in ("subject",) if name in given
        }
    _refuse_names(given, where)
    try:
        return Fact.make(**given)
    except FactError as error:
        raise FactError(f"{where}: {error}") from error


_EXAMPLE = '{"prompt": "The capital of Atlantis is", "answer": "Poseidonia"}.'


def _refuse_names(given: dict[str, Any], where: str) -> None:
    for name, value in given.items():
        if name not in _NAMES:
            raise FactError(f"{where}: {_short(name)!r} is none of {', '.join(_NAMES)}.")
        if value is not None and not isinstance(value, str):
            raise FactError(f"{where}: {name} is a text, not {_short(json.dumps(value))}.")


def _refuse_subject(subject: str, text: str) -> None:
    if not WORD.search(subject):
        raise FactError(
            f'"{_short(text)}" has no subject that shows by its capitals: name it with --subject.'
        )
    if not stands_in(subject, text):
        raise FactError(f'The subject "{_short(subject)}" does not stand in "{_short(text)}".')


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:79] + "…"
