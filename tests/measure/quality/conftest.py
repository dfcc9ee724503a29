"""Both sides of a comparison on a tiny model, and what to read."""

import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from ullage import Device, Execution, Recipe, Workload, techniques

CPU = Device("a machine", "cpu", 16 << 30)


@pytest.fixture
def sides_of(
    tiny_model: Callable[..., tuple[Any, Any]],
) -> Iterator[Callable[..., tuple[Any, Any]]]:
    """`sides_of(*typed, tokens=, **changes)`: the tiny llama dense, and with techniques as typed;
    both pools are empty again at the end."""
    from ullage.kv import attention
    from ullage.measure.quality.sides import both_sides

    opened = []
    with ExitStack() as stack:

        def make(*typed: str, tokens: int = 200, **changes: Any) -> tuple[Any, Any]:
            model, spec = tiny_model("llama", **changes)
            attention.register()
            model.set_attn_implementation(attention.NAME)
            chosen = tuple(techniques.choice_of(techniques.parse(text)) for text in typed)
            execution = Execution(dtype="fp32", kv_dtype="fp32")
            dense = Recipe(spec, CPU, Workload(tokens - 1, 1), execution)
            compressed = replace(dense, techniques=chosen)
            sides = stack.enter_context(both_sides(model, dense, compressed))
            opened.extend(sides)
            return sides

        yield make
        for side in opened:
            side.pool.check_integrity(all_free=True)


@pytest.fixture(scope="session")
def words() -> Callable[[int, int], str]:
    """`words(count, seed)`: a text of as many tokens of the tiny models' tokenizer."""

    def make(count: int, seed: int = 0) -> str:
        draw = random.Random(seed)
        return " ".join(f"w{draw.randrange(6, 64)}" for _ in range(count))

    return make


@pytest.fixture(scope="session")
def tokenizer(model_folder: Callable[..., Any]) -> Any:
    """The tiny models' own: a word a token."""
    from ullage.runtime.load import load_tokenizer

    return load_tokenizer(model_folder("llama"))


@pytest.fixture(scope="session")
def byte_tokenizer() -> Any:
    """A token a byte, 256 of them: for what is written in plain words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({sign: n for n, sign in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)
