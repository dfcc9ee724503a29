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
_SHORT = "Dr Ft Jr Mr Mrs Ms Mt Prof Sr St Ste"  # with a point behind them
_SHORT_WORDS = frozenset(_SHORT.split())
_INSIDE_WORDS = frozenset(_INSIDE_A_NAME.split())
_OPENING_WORDS = frozenset(_OPENING.split())
_NO_RELATION = _OPENING_WORDS | _INSIDE_WORDS
# Scripts that set no blanks between words: Thai, Lao, Burmese, Khmer, kana, Chinese characters.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")  # there each letter is taken for one
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
    """The longest name, in words, and the first of those: a run of capitalized words, which a date
    or a number begins only where no other does. None where there is none."""
    found = [text[start:end] for start, end in names(text)]
    return max(found, key=lambda name: (not name[0].isdigit(), len(name.split())), default=None)


def split(text: str, subject: str | None = None) -> tuple[str, str, str] | None:
    """Subject, prompt and answer of a sentence such as "The capital of Atlantis is Poseidonia.";
    None where it is no such sentence: "Rome is old" and "Rome is a city" do not contradict."""
    for verb in _VERB.finditer(text):
        prompt, answer = text[: verb.end()].strip(), text[verb.end() :].strip().rstrip(" .!")
        about = subject or find_subject(prompt)
        if not answer or about is None or not stands_in(about, prompt):
            continue
        if set(re.findall(r"\w+", relation(prompt, about))) - _NO_RELATION:
            return about, prompt, answer
    return None


def _whole(subject: str) -> re.Pattern[str]:
    name = folded(subject)
    before = "" if re.match(f"[{_UNSPACED}]", name) else r"(?<!\w)"
    after = "" if re.search(f"[{_UNSPACED}]$", name) else r"(?!\w)"
    return re.compile(before + re.escape(name) + after)


def names(text: str) -> Iterator[tuple[int, int]]:
    """Where the names in `text` start and end, as far as capitals tell, in their order."""
    run: list[re.Match[str]] = []  # words that may be a name's
    opens = True  # a sentence
    for found in re.finditer(r"(\s*)(\S+)", text):
        blank, word = found.groups()
        bare, line = _bare(word), "\n" in blank or "\r" in blank
        opens = opens or line
        if line or word[0] in _EDGES:
            yield from _name(run)
            run = []
        if len(run) == 1 and bare == "of" and _is_spelled(run[0][2]):
            run = []  # the HQ of Ferrari, which is no part of the name
        elif _may_be_named(bare, opens) or (run and bare in _INSIDE_WORDS):
            run.append(found)
        else:
            yield from _name(run)
            run = []
        ends = not word.endswith(bare) and (_owns(word) or not _is_short(bare))
        if ends:
            yield from _name(run)
            run = []
        opens = ends and word[-1] in ".!?"
    yield from _name(run)


def _is_short(bare: str) -> bool:
    """Whether a mark behind a word may be its own: F. S. Platou, St. Louis, Richard M. Nixon."""
    return bare in _SHORT_WORDS or "." in bare or (len(bare) == 1 and bare.isalpha())


def _is_spelled(bare: str) -> bool:
    """Whether a word is letters that stand for others."""
    return len(bare) > 1 and bare.isalpha() and bare.isupper()


def _owns(word: str) -> bool:
    """Whether what comes next is its own: Ferrari S.p.A.'s HQ."""
    return word.endswith(("'s", "’s"))


def _may_be_named(bare: str, opens: bool) -> bool:
    """Whether a word may be a name's, or a number's beside a name."""
    if opens and bare.casefold() in _OPENING_WORDS:
        return False
    return bare[:1].isdigit() or any(letter.isupper() for letter in bare)


def _name(run: list[re.Match[str]]) -> Iterator[tuple[int, int]]:
    """The run without the marks around it and the small words at its end, unless it is numbers."""
    while run and _bare(run[-1][2]) in _INSIDE_WORDS:
        run = run[:-1]
    if any(letter.isupper() for word in run for letter in word[2]):
        first, last = _bare(run[0][2]), _bare(run[-1][2])
        start = run[0].start(2) + run[0][2].index(first)
        yield start, run[-1].start(2) + run[-1][2].index(last) + len(last)


def _bare(word: str) -> str:
    """A word without the marks around it and the 's behind it."""
    return re.sub(r"['’]s$", "", word.strip(_EDGES))
