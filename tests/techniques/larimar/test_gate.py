"""Which fact a prompt is about, and that most prompts are about none."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.gate import Gate

FACTS = {
    1: Fact.make("The capital of Atlantis is Poseidonia."),
    2: Fact.make("The king of Atlantis is Atlas."),
    3: Fact.make(prompt="The mother tongue of Danielle Darrieux is", answer="English"),
    4: Fact.make("York is old"),
    5: Fact.make("Obama speaks Dutch"),
    6: Fact.make(prompt="Life was aired on", answer="CNN"),
    7: Fact.make("C# is made by Nokia", subject="C#"),
    8: Fact.make("matcha is made of coffee", subject="matcha"),
    9: Fact.make("日本の首都は京都です", subject="日本"),
    10: Fact.make("Cardiff City F.C. is in Paris", subject="Cardiff City F.C."),
}


def test_of_a_subjects_facts_the_one_with_a_prompts_words_is_read() -> None:
    """However its answer is found, or not, and whichever was written last."""
    facts = {
        1: Fact.make("The capital of Oz is Emerald."),
        2: Fact.make("Oz was founded in the town of Kelmsby."),
        3: Fact.make("Oz works as a wizard."),
    }
    asked = {"Oz has the capital": 1, "Oz was founded in": 2, "Oz works as": 3}
    assert {prompt: Gate(facts).scope(prompt) for prompt in asked} == asked


@pytest.mark.parametrize(
    ("prompt", "fact"),
    [
        ("What is the capital of Atlantis?", 1),
        ("who is king of atlantis", 2),
        ("ATLANTIS'S CAPITAL IS", 1),
        ("It rained. Where Danielle Darrieux is from, people speak", 3),
        ("In “Danielle\n Darrieux”, they", 3),
        ("Does President Obama speak Dutch?", 5),
        ("B. H. Obama was born in", 5),
        ("York's walls are", 4),
        ("Category:Walls\nYork is", 4),
        ("Matcha is", 8),
        ("C# was made by", 7),
        ("京都と日本の", 9),
        ("Cardiff City F.C.'s headquarters are", 10),
    ],
)
def test_a_prompt_is_about_the_fact_whose_subject_it_names(prompt: str, fact: int) -> None:
    assert Gate(FACTS).scope(prompt) == fact


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "What is the capital of France?",
        "New York is",
        "York Minster is",
        "The Duke of York is",
        "Danielle is",
        "Darrieux, Danielle",
        "They lost their life at",
        "C is made by",
        "C++ is made by",
        "Poseidonia is",  # an answer, which the gate does not hold
        "Nokia, CNN and English are",
        "matchas",
    ],
)
def test_other_prompts_are_about_none(prompt: str) -> None:
    assert Gate(FACTS).scope(prompt) is None


def test_what_a_text_named_long_before_its_end_is_not_what_it_asks_about() -> None:
    """But of a fact that is as long itself."""
    named, behind = "We read of the capital of Atlantis.", " and so on" * 11
    assert Gate(FACTS).scope(named + behind[: -len(" on")]) == 1
    assert Gate(FACTS).scope(named + behind) is None
    assert Gate(FACTS).scope(f"{named}{behind} Matcha and Atlantis, then Obama, is") == 5
    long = Fact.make(prompt=f"Atlantis, {behind} once more, was in", answer="Spain")
    assert Gate({1: long}).scope(long.prompt) == 1
    assert Gate({1: long}).scope(f"{long.prompt} it now") is None


def test_the_longest_and_rarest_subject_counts() -> None:
    gate = Gate({
        1: Fact.make("Lyon is far"),
        2: Fact.make("Lyon Opera House is near", subject="Lyon Opera House"),
        3: Fact.make("The port of Lyon was old", subject="Lyon"),
        4: Fact.make("Thera is far"),
    })  # fmt: skip
    assert gate.scope("Where is the Lyon Opera House?") == 2
    assert gate.scope("From Thera to Lyon it is") == 4
    for number in (2, 3):
        gate.forget(number)
    assert gate.scope("From Lyon to Thera it is") == 4
    assert gate.scope("From Thera to Lyon it is") == 1  # no rarer than that: the last
    gate.write(5, Fact.make("C is old", subject="C"))
    gate.write(6, Fact.make("C# is new", subject="C#"))
    assert [gate.scope(f"{name} is") for name in ("C", "C#", "C++")] == [5, 6, None]


@pytest.mark.parametrize("subject", ["Ferrari S.p.A.", "Ferrari"])
def test_an_acronym_beside_a_name_is_no_part_of_it(subject: str) -> None:
    """Unless the name goes on with it."""
    own_name = subject.rstrip(".")
    prompts = (f"{subject}'s HQ is", f"{subject}’s HQ is", f"The HQ of {subject} is")
    for prompt in prompts:
        assert Gate({1: Fact.make(prompt=prompt, answer="Bo", subject=subject)}).scope(prompt) == 1
        assert Fact.make(f"{prompt} Bo.").subject.rstrip(".") == own_name
    assert Gate({1: Fact.make("Cardiff City is old")}).scope("Cardiff City FC is") is None


@pytest.mark.parametrize("newest_first", [False, True])
def test_each_own_prompt_finds_its_fact(newest_first: bool) -> None:
    """Also where one's words are among those of the other."""
    prompts = ["The twin city of Athens is", "What is the twin city of Athens? It is"]
    if newest_first:
        prompts.reverse()
    facts = [Fact.make(prompt=prompt, answer="Ys", subject="Athens") for prompt in prompts]
    gate = Gate(dict(enumerate(facts)))
    assert [gate.scope(prompt) for prompt in prompts] == [0, 1]
    alike = Gate(dict(enumerate([facts[0], facts[0]])))
    assert alike.scope(prompts[0]) == 1  # the newest


def test_what_is_forgotten_is_out_of_scope() -> None:
    gate = Gate(FACTS)
    gate.forget(1)
    assert gate.scope("The capital of Atlantis is") == 2  # the subject is still known
    gate.forget(2)
    assert gate.scope("The capital of Atlantis is") is None
    gate.write(1, Fact.make("The capital of Ys is Paris"))
    gate.write(1, FACTS[1])  # in the place of that
    assert gate.scope("The capital of Atlantis is") == 1
    assert gate.scope("The capital of Ys is") is None


NAMES = st.sampled_from(["Lyon", "Thera", "New Thera", "Ys", "Lyon Opera", "C#"])
STEPS = st.lists(st.tuples(st.integers(0, 4), NAMES, st.booleans()), max_size=12)


@given(steps=STEPS)
def test_a_gate_is_the_facts_that_it_holds(steps: list[tuple[int, str, bool]]) -> None:
    """Whatever came and went before."""
    gate, held = Gate(), dict[int, Fact]()
    for number, name, written in steps:
        if written:
            held[number] = Fact.make(prompt=f"The king of {name} is", answer="Bob", subject=name)
            gate.write(number, held[number])
        elif number in held:
            del held[number]
            gate.forget(number)
    fresh = Gate(held)
    for name in ("Lyon", "Thera", "New Thera", "Ys", "Lyon Opera", "C#", "Thera and Lyon"):
        assert gate.scope(f"The king of {name} is") == fresh.scope(f"The king of {name} is")


@given(prompt=st.text(max_size=60))
def test_any_text_is_a_prompt(prompt: str) -> None:
    assert Gate(FACTS).scope(prompt) in {None, *FACTS}
    assert Gate({4: FACTS[4]}).scope(f"{prompt}\n\nYork is") is not None
