"""From text to tokens, without tokenizing what is too long to be read anyway."""

import re
from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from ullage.errors import PromptError

_CHARACTERS = 4  # a token, in plain text; tokenizing takes over a hundred bytes a character
_SEAM_TOKENS = 16  # what cutting a text may add
_PIECE_CHARACTERS = 1 << 16
_SEAM = re.compile(r"(?<=[^\W\d_])(?=\n)")  # a line's end behind a letter: no token goes across it
_TRIED = ("a line\nand", "\nanother, with\n\n two")  # a text in two pieces


def refuse_long(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    most_tokens: int,
    called: str = "prompt",
    way_out: str = "",
) -> None:
    """Refuse a text of more than `most_tokens` by its beginning alone: a beginning that holds as
    much as the context should, then twice that, until it is too long or the text ends. The text is
    `called` so, and `way_out` ends the sentence.

    Raises:
        PromptError: the text has more tokens.
    """
    characters = _CHARACTERS * most_tokens
    while characters < len(text):
        tokens = len(tokenizer(text[:characters])["input_ids"])
        if tokens > most_tokens + _SEAM_TOKENS:
            raise PromptError(
                f"The first {characters:,} of the {called}'s {len(text):,} characters have more "
                f"than the {most_tokens:,} tokens that the model can read{way_out}."
            )
        characters *= 2


def token_ids(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    begins: bool = True,
    piece_characters: int = _PIECE_CHARACTERS,
) -> list[int]:
    """The tokens of `text`; where it `begins`, with what the tokenizer puts around one. A long text
    is cut at ends of lines, where the tokenizer's tokens are the same so, as it would hold a
    hundred times the text."""
    ids: list[int] = []
    cut = len(text) > piece_characters and _same_in_pieces(tokenizer)
    for piece in _pieces(text, piece_characters) if cut else [text]:
        special = begins and not ids
        ids += tokenizer(piece, add_special_tokens=special)["input_ids"]
    return ids


def _pieces(text: str, characters: int) -> Iterator[str]:
    """Of at least so many characters each, the last excepted."""
    at = 0
    while at < len(text):
        seam = _SEAM.search(text, at + characters)
        stop = len(text) if seam is None else seam.start()
        yield text[at:stop]
        at = stop


def _same_in_pieces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether nothing is put before or behind each text but what begins the first one."""
    first, second = _TRIED
    ids = tokenizer(first)["input_ids"] + tokenizer(second, add_special_tokens=False)["input_ids"]
    return bool(ids == tokenizer(first + second)["input_ids"])
