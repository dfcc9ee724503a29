"""What torch cannot use is not run on."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ullage import Device
from ullage.cli import machine
from ullage.cli.machine import device_to_run, refuse_unusable
from ullage.errors import InputError
from ullage.units import GIB

CARD = Device("a card", "cuda", 24 * GIB)


@pytest.fixture(autouse=True)
def no_gpu_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize("name", ["rtx-4090", "24GiB", "mi300x"])
def test_a_named_device_that_torch_cannot_use_is_refused(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with pytest.raises(InputError, match=r"cannot run here.*--device cpu"):
        device_to_run(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert device_to_run(name).kind != "cpu"


@pytest.mark.parametrize("name", ["cpu", "CPU", "cpu-16gb"])
def test_a_cpu_needs_nothing_of_torch(name: str) -> None:
    assert device_to_run(name).kind == "cpu"


def test_without_torch_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "find_spec", lambda name: None)
    for name in (None, "cpu"):
        with pytest.raises(InputError, match=r"pip install 'ullage\[run\]'"):
            device_to_run(name)
    with pytest.raises(InputError, match="torch is not installed"):
        refuse_unusable(CARD)


@pytest.mark.skipif(os.name != "posix", reason="a shell script")
def test_a_gpu_machine_with_a_cpus_torch_runs_on_the_cpu_and_says_so(
    ullage: Callable[..., subprocess.CompletedProcess[str]],
    model_folder: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    if "+cpu" not in torch.__version__:
        pytest.skip("this torch may have a GPU")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'NVIDIA L4, 23034, 540'\n")
    smi.chmod(0o755)
    words = ["run", str(model_folder("llama")), "--prompt", "w6", "--max-new-tokens", "1"]
    done = ullage(*words, PATH=f"{tmp_path}:{os.environ['PATH']}", CUDA_VISIBLE_DEVICES="0")
    assert done.returncode == 0, done.stderr
    assert "finds no CUDA device: NVIDIA L4 is left alone, and the CPU runs" in done.stderr
