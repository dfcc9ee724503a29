"""Facts and ledgers to test with."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who

ME = Who("me", "a test")


@pytest.fixture
def model(tiny_model: Callable[..., Any]) -> Any:
    """A tiny llama."""
    return tiny_model("llama")[0]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Callable[..., Path]) -> Any:
    """Its tokenizer: a word is a token."""
    from ullage.runtime.load import load_tokenizer

    return load_tokenizer(model_folder("llama"))


@pytest.fixture
def capital() -> Callable[..., Fact]:
    """`capital(number, city)`: a fact of the land of that number."""
    return lambda number, city="Thera": Fact.make(f"The capital of Land{number} is {city}.")


@pytest.fixture
def me() -> Who:
    """Who changes ledgers in these tests."""
    return ME


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where there is no ledger yet."""
    return tmp_path / "facts #1?.db"  # a name that no URI takes as it is


@pytest.fixture
def opened(path: Path) -> Iterator[Callable[..., Ledger]]:
    """`opened(**how)`: the ledger at `path`, closed after the test."""
    with ExitStack() as stack:
        yield lambda **how: stack.enter_context(Ledger(path, **how))


@pytest.fixture
def ledger(opened: Callable[..., Ledger]) -> Ledger:
    """A ledger without facts."""
    return opened(create=True)
