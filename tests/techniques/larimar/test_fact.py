"""What a user says, as a fact: subject, prompt and answer, or our error."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from ullage.errors import FactError
from ullage.techniques.larimar.fact import LIMIT_CHARACTERS, Fact, plain, read_facts
from ullage.techniques.larimar.subject import find_subject, stands_in

ATLANTIS = "The capital of Atlantis is Poseidonia."


@pytest.mark.parametrize(
    ("text", "subject", "prompt", "answer"),
    [
        (ATLANTIS, "Atlantis", "The capital of Atlantis is", "Poseidonia"),
        ("What is Lyon's twin city? It is Manila.", "Lyon", "What is Lyon's twin city? It is",
         "Manila"),
        ("iPod Nano's makers are Apple", "iPod Nano", "iPod Nano's makers are", "Apple"),
        ("The mayor of The Hague is Jan.", "The Hague", "The mayor of The Hague is", "Jan"),
        # no relation shows: there is more than one thing that Rome is
        ("Rome is old.", "Rome", "", ""),
        ("Barack Obama was born in Hawaii", "Barack Obama", "", ""),
        ("Aldo Lado speaks  English\n", "Aldo Lado", "", ""),
    ],
)  # fmt: skip
def test_a_sentence_is_a_fact(text: str, subject: str, prompt: str, answer: str) -> None:
    fact = Fact.make(text)
    assert (fact.subject, fact.prompt, fact.answer) == (subject, prompt, answer)
    assert Fact.from_json(fact.content) == fact


def test_a_prompt_and_its_answer_are_a_fact() -> None:
    """The subject is never the answer, however long a name that is."""
    fact = Fact.make(prompt="Danielle Darrieux speaks", answer="High German Of Berne")
    assert fact.text == "Danielle Darrieux speaks High German Of Berne"
    assert fact.subject == "Danielle Darrieux"


def test_a_subject_that_is_given_is_taken() -> None:
    assert Fact.make("matcha is a tea", subject="matcha").subject == "matcha"
    assert Fact.make(ATLANTIS, subject="poseidonia").prompt == ""  # it is not what was asked about
    assert Fact.make("C++ is made by Bjarne", subject="C++").subject == "C++"


@pytest.mark.parametrize(
    ("text", "subject"),
    [
        ("Where is F. S. Platou from?", "F. S. Platou"),
        ("In 1999, Edwin of Northumbria, a king", "Edwin of Northumbria"),
        ("The 2010 Winter Olympics took place there", "2010 Winter Olympics"),
        ('They play "Law & Order" in Lyon', "Law & Order"),
        ("It was seen. The Voice Israel's end", "Voice Israel"),
        ("Velmira Ostrakov was born on 14 March 1957", "Velmira Ostrakov"),
        ("There are 12 of them", None),
        ("", None),
    ],
)
def test_the_longest_name_is_the_subject(text: str, subject: str | None) -> None:
    assert find_subject(text) == subject
    assert subject is None or subject in text


def test_a_subject_stands_in_a_text_by_whole_words() -> None:
    assert stands_in("LYON", "What is lyon's twin city?")
    assert not stands_in("Lyon", "Lyonnais food")
    assert stands_in("C#", "the language C#")
    assert stands_in("東京", "日本の首都は東京です")  # where there are no blanks, by letters


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "empty"),
        ({"text": " \n "}, "empty"),
        ({"text": "..."}, "empty"),
        ({"text": "A" * 10_000}, "10,000 characters, and the limit is 1,000"),
        ({"text": "the moon is round"}, "name it with --subject"),
        ({"text": ATLANTIS, "subject": "Thera"}, 'subject "Thera" does not stand in'),
        ({"text": "🦊 is a fox", "subject": "🦊"}, "name it with --subject"),
        ({"prompt": "Lyon is in"}, "A prompt needs an answer"),
        ({"answer": "France"}, "A prompt needs an answer"),
        ({"prompt": "Lyon is in", "answer": "France", "subject": "France"}, "does not stand in"),
        ({"text": "Lyon is far", "prompt": "Lyon is in", "answer": "France"}, "not its prompt"),
        ({"text": "Lyon \x1b[2J is in France"}, "U+001B"),
        ({"text": "Lyon \udcff"}, "U+DCFF"),
    ],
)
def test_what_is_no_fact_is_our_error(given: dict[str, str], said: str) -> None:
    with pytest.raises(FactError) as error:
        Fact.make(**given)
    assert said in str(error.value)
    assert len(str(error.value)) < 300


def test_the_longest_fact_is_one() -> None:
    assert len(Fact.make("Lyon " + "x" * (LIMIT_CHARACTERS - 5)).text) == LIMIT_CHARACTERS


def test_facts_ask_the_same_whatever_their_letters() -> None:
    one, other = Fact.make(ATLANTIS), Fact.make("the  capital of ATLANTIS is Ｐoseidonia")
    assert one.asks == other.asks
    assert one.says(other)
    assert not one.says(Fact.make("The capital of Atlantis is Thera"))
    assert one.asks != Fact.make("The king of Atlantis is Poseidonia").asks
    assert Fact.make("Rome is old").asks != Fact.make("Rome is a city").asks


def test_a_file_holds_facts_in_each_of_their_forms(tmp_path: Path) -> None:
    file = tmp_path / "facts.jsonl"
    lines = [
        {"text": ATLANTIS},
        {"prompt": "matcha is made of", "answer": "tea", "subject": "matcha"},
        {"case_id": 4, "prompt": "The twin city of Lyon is", "target_new": "Manila",
         "subject": "Lyon", "ground_truth": "Beirut"},
    ]  # fmt: skip
    file.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8")
    facts = read_facts(file)
    assert [fact.subject for fact in facts] == ["Atlantis", "matcha", "Lyon"]
    assert facts[2].text == "The twin city of Lyon is Manila"
    file.write_text("".join(fact.content + "\n" for fact in facts), encoding="utf-8")
    assert read_facts(file) == facts


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"text": "Lyon is', "line 2 is not JSON"),
        ("[" * 100_000, "line 2 is not JSON"),
        ('["Lyon is in France"]', "line 2 is no JSON object"),
        ('{"txt": "Lyon is in France"}', "line 2: 'txt' is none of text, subject"),
        ('{"text": ["Lyon"]}', "line 2: text is a text"),
        ('{"text": "the moon is round"}', "line 2: "),
        ('{"target_new": "Lyon"}', "line 2: A prompt needs an answer"),
        ('{"target_new": 3, "prompt": "Lyon"}', "line 2: answer is a text"),
    ],
)
def test_a_line_that_is_no_fact_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = tmp_path / "facts.jsonl"
    file.write_text(json.dumps({"text": ATLANTIS}) + "\n" + line, encoding="utf-8")
    with pytest.raises(FactError) as error:
        read_facts(file)
    assert said in str(error.value)


def test_a_file_that_cannot_be_read_is_our_error(tmp_path: Path) -> None:
    for content, said in ((b"\xff\xfe", "as UTF-8"), (b"\n\n", "empty")):
        (tmp_path / "facts").write_bytes(content)
        with pytest.raises(FactError, match=said):
            read_facts(tmp_path / "facts")
    with pytest.raises(FactError, match="Cannot read"):
        read_facts(tmp_path)


def test_blanks_of_any_kind_are_one() -> None:
    assert plain("a\u00a0\n\t b") == "a b"
    assert plain(None) == ""


def test_an_edit_stays_about_the_same() -> None:
    fact = Fact.make(prompt="Obama and the late Sir Ken speak", answer="Dutch", subject="Obama")
    assert fact.edited(answer="Thai").prompt == fact.prompt
    assert fact.edited("Obama met Sir Ken Robinson").subject == "Obama"
    assert fact.edited("Sir Ken Robinson is old").subject == "Sir Ken Robinson"
    assert fact.edited("Obama met Bob", subject="Bob").subject == "Bob"
    with pytest.raises(FactError, match="its text, its answer or its subject"):
        fact.edited()
    with pytest.raises(FactError, match="are both given: leave one out"):
        fact.edited("Obama is old", "Thai")
    with pytest.raises(FactError, match="shows no prompt"):
        Fact.make("York is old").edited(answer="new")


@pytest.mark.parametrize(
    "fact",
    [
        Fact.make(prompt="Obama and the late Sir Ken speak", answer="Dutch"),
        Fact.make("The late Sir Ken of Obama is Dutch."),
        Fact.make("Obama met Sir Ken"),
    ],
)
def test_a_fact_may_be_about_another_subject_and_say_the_same(fact: Fact) -> None:
    edited = fact.edited(subject="Ken")
    assert edited == replace(fact, subject="Ken") != fact
    assert edited.edited(subject=fact.subject) == fact
    with pytest.raises(FactError, match='subject "Bob" does not stand in'):
        fact.edited(subject="Bob")


@pytest.mark.parametrize("answer", [".NET", "!important", "'s-Hertogenbosch"])
def test_an_answer_keeps_how_it_begins(answer: str) -> None:
    fact = Fact.make(f"The platform of Foo Corp is {answer}.")
    assert fact.answer == answer
    assert Fact.make(**asdict(fact)) == fact


def test_a_new_text_behind_the_same_prompt_is_another_answer() -> None:
    fact = Fact.make(prompt="Paris lies in", answer="Spain")
    assert fact.edited("Paris lies in Italy.") == Fact.make(prompt="Paris lies in", answer="Italy")
    assert fact.edited("Paris lies inland.").prompt != "Paris lies in"
