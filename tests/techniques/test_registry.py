"""The folder is the registry."""

import sys
from pathlib import Path

import pytest

from ullage import techniques
from ullage.errors import TechniqueError


def test_a_folder_without_settings_is_no_technique_yet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = techniques.names()
    for name, file in (("begun", "method.py"), ("whole", "settings.py")):
        (tmp_path / name).mkdir()
        for content in ("__init__.py", file):
            (tmp_path / name / content).touch()
    monkeypatch.setattr(techniques, "__path__", [*techniques.__path__, str(tmp_path)])
    try:
        assert techniques.names() == sorted([*known, "whole"])
    finally:
        for name in ("begun", "whole"):
            sys.modules.pop(f"ullage.techniques.{name}", None)


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("DMS", "Did you mean dms?"),
        ("dms:kept", "a setting is name=value, and 'kept' has no =; it has adapter, "),
        ("dms:keep=0.5", "dms has no setting 'keep'"),
    ],
)
def test_what_is_typed_amiss_hears_what_to_type(typed: str, says: str) -> None:
    with pytest.raises(TechniqueError) as refused:
        techniques.parse(typed)
    assert says in str(refused.value)
