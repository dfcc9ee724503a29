"""What could not be written at a command's end is refused at its beginning."""

import sqlite3
from pathlib import Path

import pytest

from ullage.cli.written import refuse_undrawable, refuse_unwritable
from ullage.errors import InputError


def test_files_that_can_be_written_pass(tmp_path: Path) -> None:
    refuse_unwritable(tmp_path / "new.json", tmp_path / "other.json")
    refuse_undrawable(tmp_path / "new.SVG")
    assert not list(tmp_path.iterdir())


def test_each_file_is_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="Cannot write"):
        refuse_unwritable(tmp_path / "new.json", tmp_path)
    with pytest.raises(InputError, match="Cannot write"):
        refuse_undrawable(tmp_path / "none" / "new.png")
    sqlite3.connect(tmp_path / "facts.db").execute("CREATE TABLE events (number)")
    with pytest.raises(InputError, match=r"facts\.db is a database"):
        refuse_unwritable(tmp_path / "facts.db")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="Cannot write"):
        refuse_unwritable(tmp_path / "file" / "new.json")
    with pytest.raises(InputError, match=r"\.svg or \.png"):
        refuse_undrawable(tmp_path / "new.pdf")
