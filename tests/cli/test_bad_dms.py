"""What DMS cannot do, through the command line: one line, exit code 2, before weights are read."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest

from ullage.techniques.dms.adapter import DECIDED_TOKENS, Adapter

Typed = Callable[..., subprocess.CompletedProcess[str]]
Refused = Callable[..., None]
SIZED = ["--device", "cpu-16gb"]


def save_adapter(path: Path, layers: int = 2) -> Path:
    """Of the tiny llama's shape, of nobody's weights."""
    loss = numpy.ones((layers, 2, 3), numpy.float32)
    captured = numpy.ones((layers, 2, DECIDED_TOKENS), numpy.float32)
    Adapter((4, 8, 16), loss, captured, 8, "of nobody", {}).save(path)
    return path


@pytest.fixture(params=["plan", "run", "eval"])
def refused(request: pytest.FixtureRequest, typed: Typed, tmp_path: Path) -> Refused:
    """`refused(model, technique, says)`: by each command, with nothing said but that."""
    words = {
        "plan": ["--max-model-len", "100"],
        "run": ["--prompt", "w6 w7"],
        "eval": ["--suite", "perplexity", "--data", str(tmp_path), "--tokens", "60",
                 "--beyond", "20"],
    }[request.param]  # fmt: skip
    (tmp_path / "text.txt").write_text("w6 w7 w8 " * 60)

    def check(model: str, technique: str, says: str) -> None:
        done = typed(request.param, model, "--technique", technique, *words, *SIZED)
        assert (done.returncode, done.stdout) == (2, ""), done
        assert says in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1

    return check


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ("window=0", "window is a positive count"),
        ("window=-3", "window is a positive count"),
        ("window=1e9", "window is a whole number"),
        ("window=True", "window is a whole number"),
        ("kept=0", "kept is above 0"),
        ("kept=1.5", "kept is above 0"),
        ("kept=nan", "kept is above 0"),
        ("kept=inf", "kept is above 0"),
        ("kept=True", "kept is a number"),
        ("predictor=oracle", "predictor is one of"),
        ("budget=12parsecs", "budget '12parsecs' has no unit that is known"),
        ("budget=80%", "here an absolute size is needed"),
        ("budget=16", "budget '16' has no unit"),
        ("budget=16KiB,kept=0.25", "kept follows from a budget"),
        ("budget=16KiB,predictor=window", "set the window"),
        ("window=16,budget=3KiB", "a budget of 3KiB is below the window"),
        ("adapter=/", "neither a file nor"),
        ("adapter=of-nobody", "neither a file nor"),
        ("adapter=" + "x" * 5000, "neither a file nor"),
    ],
)
def test_settings_that_cannot_be(
    refused: Refused, model_folder: Callable[[str], Path], settings: str, says: str
) -> None:
    refused(str(model_folder("llama")), f"dms:{settings}", says)


@pytest.mark.parametrize(
    ("family", "settings"), [("mistral", ""), ("mistral", "adapter={}"), ("gemma2", "adapter={}")]
)
def test_models_that_cannot_be(
    refused: Refused,
    model_folder: Callable[[str], Path],
    tmp_path: Path,
    family: str,
    settings: str,
) -> None:
    adapter = save_adapter(tmp_path / "mine.safetensors")
    settings = settings.format(adapter)
    refused(str(model_folder(family)), f"dms:window=4,{settings}", "dms cannot act on")


def test_an_adapter_of_another_shape(
    refused: Refused, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "mine.safetensors", layers=3)
    says = "the adapter is for a model of 3 layers"
    refused(str(model_folder("llama")), f"dms:window=4,adapter={adapter}", says)


def test_a_window_below_the_adapters_least(
    refused: Refused, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "mine.safetensors")
    says = "3 entries a head on average are below"
    refused(str(model_folder("llama")), f"dms:kept=0.001,window=3,adapter={adapter}", says)


@pytest.mark.parametrize("left", [0, 40, -3])
def test_a_damaged_adapter(
    refused: Refused, model_folder: Callable[[str], Path], tmp_path: Path, left: int
) -> None:
    adapter = save_adapter(tmp_path / "mine.safetensors")
    adapter.write_bytes(adapter.read_bytes()[:left])
    refused(str(model_folder("llama")), f"dms:adapter={adapter}", "is not an adapter of DMS, or")


def test_a_model_is_no_adapter(refused: Refused, model_folder: Callable[[str], Path]) -> None:
    folder = model_folder("llama")
    weights = folder / "model.safetensors"
    refused(str(folder), f"dms:adapter={weights}", "is not an adapter of DMS, or")


@pytest.mark.parametrize("command", ["run", "eval"])
def test_an_adapter_of_other_weights(
    typed: Typed, model_folder: Callable[[str], Path], tmp_path: Path, command: str
) -> None:
    """Which are told apart once they are read."""
    adapter = save_adapter(tmp_path / "mine.safetensors")
    (tmp_path / "text.txt").write_text("w6 w7 w8 " * 60)
    words = {
        "run": ["--prompt", "w6"],
        "eval": ["--suite", "perplexity", "--data", str(tmp_path), "--tokens", "60",
                 "--beyond", "20"],
    }[command]  # fmt: skip
    technique = f"dms:window=4,adapter={adapter}"
    done = typed(command, str(model_folder("llama")), "--technique", technique, *words, *SIZED)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip().splitlines()[-1].endswith("was made for other weights than these.")


def test_a_path_may_have_any_letters(
    typed: Typed, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    adapter = save_adapter(tmp_path / "na\u00efve, 2nd.safetensors")
    words = ["--technique", f"dms:window=4,adapter={adapter},kept=0.25", "--json"]
    done = typed("plan", str(model_folder("llama")), *words, *SIZED)
    assert done.returncode == 0, done.stderr
    assert "2nd.safetensors" in done.stdout


@pytest.mark.parametrize(
    "model",
    [
        "deepseek-v3",  # latent attention
        "kimi-linear-48b-a3b",  # latent and linear attention
        "mistral-7b-v0.1",  # a window in each layer
    ],
)
def test_attention_that_keeps_no_tokens_head_by_head(typed: Typed, model: str) -> None:
    done = typed("plan", model, "--technique", "dms", "--device", "h100")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"dms cannot act on {model}" in done.stderr


def test_a_budget_below_the_window(typed: Typed, model_folder: Callable[[str], Path]) -> None:
    words = ["--prompt", "w6", "--memory", "8MiB", "--technique", "dms:window=100", *SIZED]
    done = typed("run", str(model_folder("llama")), *words)
    assert (done.returncode, done.stdout) == (1, "")
    assert "does not fit in 8.0 MiB: --memory" in done.stderr
