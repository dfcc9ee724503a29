"""What of a fact is put to a model, and which tokens of that are kept."""

import math

from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.wording import LEADS, Wording

CAPITAL = Fact.make("The capital of Atlantis is Poseidonia.")


def kept_words(wording: Wording) -> list[str]:
    """Of tokens that are words with what is before them."""
    places, at = [], 0
    for word in wording.text.split(" "):
        places.append((max(0, at - 1), at + len(word)))
        at += len(word) + 1
    words = wording.text.split(" ")
    return [words[token] for token in wording.kept(places)]


def test_the_answers_are_kept_and_nothing_else() -> None:
    wording = Wording.of(CAPITAL)
    assert [wording.text[start:end] for start, end in wording.spans] == ["Poseidonia"] * (
        1 + len(LEADS)
    )
    assert all("Poseidonia" in word for word in kept_words(wording))
    assert "Atlantis of Poseidonia.\n" in wording.text
    assert "The capital of Atlantis is Poseidonia.\n" in wording.text
    assert len(Wording.of(CAPITAL, ()).spans) == 1


def test_an_answer_is_kept_where_it_is_one() -> None:
    """Not where the prompt or the subject has its words too."""
    fact = Fact.make(prompt="York is in New York and in", answer="York", subject="York")
    assert len(Wording.of(fact).kept(places := [(0, 4), (27, 31)])) == len(places) - 1


def test_of_a_sentence_without_an_answer_all_is_kept_once() -> None:
    wording = Wording.of(Fact.make("York is old"))
    assert wording.text == "York is old\nYork is old\n"
    assert wording.kept([(0, 4), (4, 12), (12, 16), (16, 23)]) == [2, 3]
    assert math.exp(wording.bias) < math.exp(Wording.of(CAPITAL).bias)
