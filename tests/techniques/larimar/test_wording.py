"""What of a fact is put to a model, and which tokens of that are kept."""

from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.wording import BIAS, LEADS, Wording

CAPITAL = Fact.make("The capital of Atlantis is Poseidonia.")


def test_answers_are_kept_and_the_word_before_each() -> None:
    wording = Wording.of(CAPITAL)
    kept = [wording.text[span.start : span.end] for span in wording.spans]
    assert kept[::2] == [*LEADS, "is"]
    assert kept[1::2] == ["Poseidonia"] * (1 + len(LEADS))
    assert {span.bias for span in wording.spans[::2]} == {0}
    assert {span.bias for span in wording.spans[1::2]} == {BIAS}
    assert "Atlantis of Poseidonia.\n" in wording.text
    assert wording.text.endswith("\nThe capital of Atlantis is Poseidonia.\n")
    assert len(Wording.of(CAPITAL, ()).spans) == 2


def test_tokens_are_kept_that_reach_into_what_is() -> None:
    """An answer's where it is one: not where the prompt has its words too."""
    fact = Fact.make(prompt="York is in New York and in", answer="York", subject="York")
    places = [(0, 4), (4, 7), (7, 10), (10, 14), (14, 19), (19, 23), (23, 26), (26, 31), (31, 33)]
    assert Wording.of(fact, ()).kept(places) == {6: 0, 7: BIAS}
    assert list(Wording.of(fact, ()).kept([(0, 24), (24, 29), (29, 32), (32, 33)])) == [1, 2]


def test_of_a_sentence_without_an_answer_all_is_kept() -> None:
    wording = Wording.of(Fact.make("York is old"))
    assert wording.text == "York is old\n"
    assert wording.kept([(0, 4), (4, 12)]) == {0: 0, 1: 0}
