"""The allocators' settings are those of the environment, or ours, before torch is there."""

import os
import subprocess
import sys

import pytest

_SHOW = "import ullage.runtime, os, sys; print('torch' in sys.modules, os.environ.get('{}'))"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone has them")
@pytest.mark.parametrize(
    ("given", "name", "shown"),
    [
        ({}, "PYTORCH_ALLOC_CONF", "expandable_segments:True"),
        ({"PYTORCH_ALLOC_CONF": "x"}, "PYTORCH_ALLOC_CONF", "x"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, "PYTORCH_ALLOC_CONF", "None"),
    ],
)
def test_segments_expand_unless_the_environment_says_how(
    given: dict[str, str], name: str, shown: str
) -> None:
    unset = {key: value for key, value in os.environ.items() if not key.startswith("PYTORCH_")}
    done = subprocess.run(
        [sys.executable, "-c", _SHOW.format(name)],
        env=unset | given, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.split() == ["False", shown]
