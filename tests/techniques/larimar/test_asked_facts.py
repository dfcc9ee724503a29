"""Facts to learn from: what is kept back to measure with is not among them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ullage.errors import InputError
from ullage.techniques.larimar.asked_facts import AskedFact, read_asked_facts
from ullage.techniques.larimar.fact import LIMIT_CHARACTERS, Fact

RELATION = {
    "prompt_templates": ["The king of {} is", "{} is ruled by"],
    "samples": [{"subject": f"Land{n}", "object": f"King{n}"} for n in range(20, 26)],
}
Write = Callable[[str, Any], Path]


def record(subject: str, answer: str = "Thera", **more: Any) -> dict[str, Any]:
    """As CounterFact's are, with what nobody asks for."""
    prompt = f"The capital of {subject} is"
    rephrased = {"rephrase_prompt": f"{subject}'s capital is"}
    known = {"case_id": 1, "prompt": prompt, "subject": subject, "target_new": answer}
    return known | rephrased | more


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """`write(name, content)`: a JSON file in the folder facts."""

    def made(name: str, content: Any) -> Path:
        file = tmp_path / "facts" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        return file

    return made


@pytest.fixture
def data(write: Write, tmp_path: Path) -> Path:
    write("counterfact-train.json", [record(f"Land{n}", f"City{n}") for n in range(20)])
    write("counterfact-edit.json", [record(f"Land{n}") for n in (3, 5, 22)])
    write("my_TEST.json", [record("LAND7")])
    write("relations/country_king.json", RELATION)
    return tmp_path


def subjects(found: list[AskedFact]) -> set[str]:
    return {asked.fact.subject for asked in found}


def test_what_is_kept_back_is_nowhere(data: Path) -> None:
    """Neither as a subject nor as an answer, whatever file it is in, in whatever case."""
    found = read_asked_facts(data, 100)
    left = {f"Land{n}" for n in range(26)} - {"Land3", "Land5", "Land7", "Land22"}
    assert subjects(found) == left
    assert len(found) == len(left)
    for asked in found:
        assert not {"Land3", "Land5", "Land7", "Land22"} & set(asked.fact.text.split())


def test_answers_may_be_anything(data: Path) -> None:
    """A third is a name of another's, objects of a relation are mixed; questions are as they
    were."""
    found = read_asked_facts(data, 100)
    strange = [asked for asked in found if asked.fact.answer.startswith("Land")]
    assert len(strange) == -(-len(found) // 3)
    for asked in found:
        fact = asked.fact
        assert fact.answer != fact.subject
        if fact.prompt.startswith("The king"):
            assert asked.questions == (f"The king of {fact.subject} is",
                                       f"{fact.subject} is ruled by")  # fmt: skip
        else:
            assert asked.questions == (f"The capital of {fact.subject} is",
                                       f"{fact.subject}'s capital is")  # fmt: skip
    kings = [asked.fact for asked in found if asked.fact.answer.startswith("King")]
    assert any(fact.subject[4:] != fact.answer[4:] for fact in kings)


def test_the_order_is_always_the_same(data: Path) -> None:
    """Wherever the folder is; fewer facts are the first of more."""
    found = read_asked_facts(data, 100)
    assert read_asked_facts(data, 100) == found
    assert read_asked_facts(data / "facts", 100) == found
    assert read_asked_facts(data, 7) == found[:7]
    moved = data.rename(data.with_name("moved"))
    assert read_asked_facts(moved, 100) == found
    assert [asked.fact.subject for asked in found] != sorted(subjects(found))


def test_what_is_no_fact_is_left_out(write: Write, tmp_path: Path) -> None:
    """And an answer that a name would make too long stays."""
    long = f"The capital of {'y' * (LIMIT_CHARACTERS - 60)} Ys is"
    name = "Atlantis " * 10 + "Thera"
    facts = [
        record("Rome"),
        record("Ys", prompt="The capital of Lyon is"),
        record("Lyon", ""),
        record("Ys", prompt=long, rephrase_prompt=None),
        record(name),
    ]
    write("facts.json", facts)
    found = read_asked_facts(tmp_path, 100)
    assert subjects(found) == {"Rome", "Ys", name}
    own = next(asked for asked in found if asked.fact.subject == "Ys")
    assert own.questions == (long,)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[" * 100_000,
        "3",
        '["a fact"]',
        '[{"prompt": "The king of Ys is"}]',
        [record("Ys", target_new=3)],
        {"prompt_templates": [], "samples": []},
        {"prompt_templates": ["{} and {}"], "samples": RELATION["samples"]},
        {"prompt_templates": ["{0[name]}"], "samples": RELATION["samples"]},
        {"prompt_templates": ["The king of {} is"]},
    ],
    ids=lambda content: str(content)[:30],
)
def test_a_broken_file_is_our_error(write: Write, data: Path, content: Any) -> None:
    file = write("broken.json", content)
    with pytest.raises(InputError, match=r"holds no list of facts|is not JSON") as error:
        read_asked_facts(data, 100)
    assert str(file) in str(error.value)


def test_a_file_that_is_no_text_is_our_error(write: Write, data: Path) -> None:
    write("broken.json", "").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"broken\.json is not JSON"):
        read_asked_facts(data, 100)


def test_a_folder_without_facts_is_our_error(write: Write, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="holds no facts to learn from"):
            read_asked_facts(folder, 100)
    write("counterfact-edit.json", [record("Ys")])
    with pytest.raises(InputError, match="named after a test or an edit are left out"):
        read_asked_facts(tmp_path, 100)


def test_facts_a_line_each_are_read(tmp_path: Path) -> None:
    """As `ullage memory export` writes them; those without a prompt teach nothing."""
    facts = [Fact.make("The capital of Ys is Is."), Fact.make("Ys works as a wizard")]
    lines = "".join(f"{fact.content}\n" for fact in facts)
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "mine.jsonl").write_text(lines, encoding="utf-8")
    assert [asked.questions for asked in read_asked_facts(folder, 9)] == [(facts[0].prompt,)]
