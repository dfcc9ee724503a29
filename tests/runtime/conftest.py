"""`copied(family)`: a tiny model's folder of one's own."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ModelFolder = Callable[..., Path]


@pytest.fixture
def copied(tmp_path: Path, model_folder: ModelFolder) -> Callable[[str], Path]:
    """A tiny model's folder of one's own."""
    return lambda family: Path(shutil.copytree(model_folder(family), tmp_path / family))
