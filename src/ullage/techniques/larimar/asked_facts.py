"""Facts to learn from, and how each may be asked for. No torch."""

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ullage.errors import FactError, InputError
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.subject import folded

_TESTS = {"test", "edit"}  # words in the names of files that are to measure with
_STRANGE = 3  # every so many facts has an answer that no relation gives


@dataclass(frozen=True)
class AskedFact:
    """A fact, and prompts that its answer follows."""

    fact: Fact
    questions: tuple[str, ...]


def read_asked_facts(folder: Path, count: int) -> list[AskedFact]:
    """`count` of the facts in the .json and .jsonl files of `folder`, or of its folder facts, in an
    order that is always the same. A file is a list of objects, or has one a line, with `prompt`,
    `subject`, `answer` (in CounterFact `target_new`) and perhaps `rephrase_prompt`; or it is one
    relation, with `prompt_templates` and `samples` of `subject` and `object`. Objects are mixed:
    what a model knows teaches nothing. Answers are mixed with names of subjects, so that they may
    be anything.
    Files named after a test or an edit are left to be measured with, and so are their subjects
    wherever they stand, in whatever case.

    Raises:
        InputError: there are none, or a file is no such list.
    """
    chance = random.Random(0)
    inside = folder / "facts" if (folder / "facts").is_dir() else folder
    files = sorted(file for kind in ("*.json", "*.jsonl") for file in inside.rglob(kind))
    read = {file: _in_file(file, chance) for file in files}
    back = {folded(asked.fact.subject) for file in files if _is_test(file) for asked in read[file]}
    found = [
        asked for file in files for asked in read[file] if folded(asked.fact.subject) not in back
    ]
    if not found:
        raise InputError(
            f"{folder} holds no facts to learn from: put JSON files of them there, or in its "
            "folder facts. Those named after a test or an edit are left out."
        )
    chance.shuffle(found)
    return [
        _strange(asked, found[-1 - at]) if at % _STRANGE == 0 else asked
        for at, asked in enumerate(found[:count])
    ]


def _is_test(file: Path) -> bool:
    return not _TESTS.isdisjoint(re.findall("[a-z]+", file.stem.lower()))


def _in_file(file: Path, chance: random.Random) -> list[AskedFact]:
    content = _content(file)
    try:
        records = content if isinstance(content, list) else _of_relation(content, chance)
        return [asked for record in records if (asked := _asked(record)) is not None]
    except (LookupError, TypeError, ValueError, AttributeError):
        raise InputError(
            f"{file} holds no list of facts: each is an object of prompt, subject and answer, "
            "and perhaps rephrase_prompt."
        ) from None


def _content(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [json.loads(line) for line in text.splitlines() if line.strip()]
        return json.loads(text)
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file} is not JSON ({str(error)[:80]}).") from None


def _of_relation(relation: dict[str, Any], chance: random.Random) -> list[dict[str, str]]:
    first, *others = relation["prompt_templates"]
    samples = relation["samples"]
    objects = [sample["object"] for sample in samples]
    chance.shuffle(objects)
    return [
        {
            "prompt": first.format(sample["subject"]),
            "rephrase_prompt": (others or [first])[0].format(sample["subject"]),
            "subject": sample["subject"],
            "target_new": answer,
        }
        for sample, answer in zip(samples, objects, strict=True)
    ]


def _asked(record: dict[str, str]) -> AskedFact | None:
    """None where it is no fact that could be written: a subject that does not stand in it, or one
    whose answer is not known."""
    prompt, rephrase = record["prompt"], record.get("rephrase_prompt")
    answer = record["target_new"] if "target_new" in record else record["answer"]
    if not prompt or not answer:
        return None
    try:
        fact = Fact.make(None, record["subject"], prompt, answer)
    except FactError:
        return None
    return AskedFact(fact, (prompt, rephrase) if rephrase else (prompt,))


def _strange(asked: AskedFact, other: AskedFact) -> AskedFact:
    """Its answer another one's subject, if it is not too long for it."""
    fact, answer = asked.fact, other.fact.subject
    try:
        return replace(asked, fact=Fact.make(None, fact.subject, fact.prompt, answer))
    except FactError:
        return asked
