"""The tokenizer of a model, read once for all who want it while one of them has it."""

from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# one of 49,152 tokens takes some 25 MiB, which a plan has once
_IN_USE: "WeakValueDictionary[str, PreTrainedTokenizerBase]" = WeakValueDictionary()


def shared_tokenizer(where: str) -> "PreTrainedTokenizerBase":
    """The tokenizer in a folder, or of a hub's name; never code of it. Who asks leaves it as it is.

    Raises:
        OSError, ValueError, KeyError: there is none that can be read.
    """
    from transformers import AutoTokenizer

    tokenizer = _IN_USE.get(where)
    if tokenizer is None:
        tokenizer = _IN_USE[where] = AutoTokenizer.from_pretrained(where, trust_remote_code=False)
    return tokenizer
