"""`diagnosed(text)`: what the doctor says of a log."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ullage.doctor import Diagnosis, diagnose


@pytest.fixture
def diagnosed(tmp_path: Path) -> Callable[[str], Diagnosis]:
    def run(text: str) -> Diagnosis:
        log = tmp_path / "engine.log"
        log.write_text(text, encoding="utf-8")
        return diagnose(log)

    return run
