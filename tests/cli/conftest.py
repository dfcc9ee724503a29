"""The command line without a process of its own: as quick as a function, as whole as a shell's."""

import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from ullage import cli


@pytest.fixture
def typed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """`typed(*words)`: what `ullage WORDS` says on a terminal of 160 columns, offline; a bug is
    exit code 3."""
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("ULLAGE_DEBUG", raising=False)

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["ullage", *words])
        before = signal.getsignal(signal.SIGINT)
        capsys.readouterr()
        try:
            with pytest.raises(SystemExit) as ended:
                cli.main()
        finally:
            signal.signal(signal.SIGINT, before)
        printed = capsys.readouterr()
        return subprocess.CompletedProcess(words, int(ended.value.code or 0), *printed)

    return run
