"""What a sentence is about, and where its answer begins, by its letters alone."""

import re
import unicodedata
from collections.abc import Iterator

_VERB = re.compile(r"(?<!\bwho)(?<!\bwhich)(?<!\bthat) (?:is|are|was|were) ", re.IGNORECASE)
# Between capitalized words these belong to a name: Edwin of Northumbria.
_INSIDE_A_NAME = "of the de da di do del della der den van von la le du des and y al el bin ben &"
# What opens a sentence is capitalized, name or not.
_OPENING = (
    "the a an in on at by for from to of with as and but if it its he she they his her their this "
    "that these those there my your our i we you what who whom whose when where which why how is "
    "are was were does do did can could will would has have had"
)
_INSIDE_WORDS = frozenset(_INSIDE_A_NAME.split())
_OPENING_WORDS = frozenset(_OPENING.split())
_NO_RELATION = _OPENING_WORDS | _INSIDE_WORDS
_EDGES = "\"'“”‘’«»()[]{}<>,.;:!?…"


def folded(text: str) -> str:
    """`text` as it is compared: in one case and one form of each letter, without the last mark."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(plain.split()).rstrip(" .,;:!?…")


def stands_in(subject: str, text: str) -> bool:
    """Whether the words of `subject` stand in `text`, in whatever case."""
    return bool(_whole(subject).search(folded(text)))


def relation(prompt: str, subject: str) -> str:
    """What `prompt` asks of any subject: itself, folded, with {} for `subject`."""
    return _whole(subject).sub("{}", folded(prompt))


def find_subject(text: str) -> str | None:
    """The longest name, in words, and the first of those: a run of capitalized words. None where
    there is none."""
    names = list(_names(text))
    return max(names, key=lambda name: len(name.split()), default=None)


def split(text: str, subject: str | None = None) -> tuple[str, str, str] | None:
    """Subject, prompt and answer of a sentence such as "The capital of Atlantis is Poseidonia.";
    None where it is no such sentence: "Rome is old" and "Rome is a city" do not contradict."""
    for verb in _VERB.finditer(text):
        prompt, answer = text[: verb.end()].strip(), text[verb.end() :].strip(" .!")
        about = subject or find_subject(prompt)
        if not answer or about is None or not stands_in(about, prompt):
            continue
        if set(re.findall(r"\w+", relation(prompt, about))) - _NO_RELATION:
            return about, prompt, answer
    return None


def _whole(subject: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(folded(subject))}(?!\w)")


def _names(text: str) -> Iterator[str]:
    run: list[re.Match[str]] = []  # words that may be a name's
    opens = True  # a sentence
    for found in re.finditer(r"\S+", text):
        word, bare = found[0], _bare(found[0])
        if run and word[0] in _EDGES:
            yield from _name(text, run)
            run = []
        if _may_be_named(bare, opens) or (run and bare in _INSIDE_WORDS):
            run.append(found)
        else:
            yield from _name(text, run)
            run = []
        ends = len(bare) > 2 and not word.endswith(bare)  # and no St. Louis, no Richard M. Nixon
        if ends:
            yield from _name(text, run)
            run = []
        opens = ends and word[-1] in ".!?"
    yield from _name(text, run)


def _may_be_named(bare: str, opens: bool) -> bool:
    """Whether a word may be a name's, or a number's beside a name."""
    if opens and bare.casefold() in _OPENING_WORDS:
        return False
    return bare[:1].isdigit() or any(letter.isupper() for letter in bare)


def _name(text: str, run: list[re.Match[str]]) -> Iterator[str]:
    """The run as it stands in `text`, without the small words at its end, unless it is numbers."""
    while run and run[-1][0] in _INSIDE_WORDS:
        run = run[:-1]
    if any(letter.isupper() for word in run for letter in word[0]):
        last = run[-1]
        before, bare = len(last[0]) - len(last[0].lstrip(_EDGES)), _bare(last[0])
        start = run[0].start() + len(run[0][0]) - len(run[0][0].lstrip(_EDGES))
        yield text[start : last.start() + before + len(bare)]


def _bare(word: str) -> str:
    """A word without the marks around it and the 's behind it."""
    return re.sub(r"['’]s$", "", word.strip(_EDGES))
