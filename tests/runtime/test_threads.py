"""Waiting threads sleep soon, unless the environment says otherwise."""

import os
import subprocess
import sys

import pytest

SHOW = "import ullage.runtime, os; print(os.environ.get('GOMP_SPINCOUNT'))"


@pytest.mark.parametrize(
    ("given", "turns"),
    [
        ({}, "5000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "None"),
    ],
)
def test_the_environment_has_the_last_word(given: dict[str, str], turns: str) -> None:
    names = {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}
    around = {name: value for name, value in os.environ.items() if name not in names}
    shown = subprocess.run(
        [sys.executable, "-c", SHOW], env=around | given, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == turns


def test_it_is_said_before_torch_reads_it() -> None:
    code = "import sys, ullage.runtime; print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout.strip() == "False"
