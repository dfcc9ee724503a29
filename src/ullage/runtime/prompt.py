"""From text to tokens, without tokenizing what is too long to be read anyway."""

from transformers import PreTrainedTokenizerBase

from ullage.errors import PromptError

_CHARACTERS = 4  # a token, in plain text; tokenizing takes over a hundred bytes a character
_SEAM_TOKENS = 16  # what cutting a text may add


def refuse_long(text: str, tokenizer: PreTrainedTokenizerBase, most_tokens: int) -> None:
    """Refuse a text of more than `most_tokens` by its beginning alone: a beginning that holds as
    much as the context should, then twice that, until it is too long or the text ends.

    Raises:
        PromptError: the text has more tokens.
    """
    characters = _CHARACTERS * most_tokens
    while characters < len(text):
        tokens = len(tokenizer(text[:characters])["input_ids"])
        if tokens > most_tokens + _SEAM_TOKENS:
            raise PromptError(
                f"The first {characters:,} of the prompt's {len(text):,} characters have more than "
                f"the {most_tokens:,} tokens that the model can read."
            )
        characters *= 2
