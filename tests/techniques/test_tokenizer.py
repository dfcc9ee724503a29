"""A tokenizer takes its bytes once."""

import gc
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from ullage.runtime.load import load_tokenizer
from ullage.techniques.tokenizer import shared_tokenizer


def test_who_wants_it_shares_it_while_one_has_it(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(model_folder("llama"), tmp_path / "own")
    first = load_tokenizer(folder)
    assert shared_tokenizer(str(folder)) is first
    held = weakref.ref(first)
    del first
    gc.collect()
    assert held() is None


def test_a_folder_without_one_stays_without(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        shared_tokenizer(str(tmp_path))
