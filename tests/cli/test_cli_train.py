"""ullage train, as a shell sees it, on a tiny model."""

import json
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from shutil import copytree

import numpy
import pytest
import torch
from safetensors.numpy import save

from ullage.techniques import parse
from ullage.techniques.dms.adapter import ADAPTERS, Adapter
from ullage.techniques.dms.training import Point, Trainer

Typed = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "books").mkdir()
    for name in ("one.txt", "books/two.txt", "books/moby_dick.txt"):
        text = " ".join(f"w{6 + (n * n + len(name)) % 58}" for n in range(400))
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.fixture
def train(typed: Typed, model_folder: Callable[[str], Path], data: Path) -> Typed:
    """`train(*words)`: an adapter of the tiny llama from two texts, in `data`."""
    words = [
        "train",
        "dms",
        str(model_folder("llama")),
        "--data",
        str(data),
        "--device",
        "cpu-16gb",
    ]
    return lambda *more: typed(*words, "--output", str(data / "made.safetensors"), *more)


def test_what_is_made_can_be_planned_and_run(
    train: Typed, typed: Typed, model_folder: Callable[[str], Path], data: Path
) -> None:
    done = train("--tokens", "200", "--pieces", "3", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["pieces"] == [
        "books/two:0",
        "one:0, recalling",
        "books/two:1",
    ]  # nothing to test with is among them
    assert found["windows"] == [64, 96]
    technique = f"dms:predictor=window,window=80,adapter={data / 'made.safetensors'}"
    words = [str(model_folder("llama")), "--technique", technique]
    run = typed("run", *words, "--prompt", "w9 w8 " * 60, "--max-new-tokens", "4")
    assert run.returncode == 0, run.stderr


def test_a_predictor_is_trained_and_drawn(
    train: Typed, typed: Typed, model_folder: Callable[[str], Path], data: Path
) -> None:
    words = ["--tokens", "200", "--to", "1.1x", "--steps", "3", "--step-tokens", "150"]
    done = train(*words, "--plot", str(data / "drawn.svg"), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["training"] == {"ratio": 1.1, "steps": 3, "tokens": 150}
    assert 0 < found["last"]["kept"] <= 1
    assert "<svg" in (data / "drawn.svg").read_text()
    assert not list(data.glob("*.training"))
    technique = f"dms:predictor=dms,window=80,adapter={data / 'made.safetensors'}"
    words = [str(model_folder("llama")), "--technique", technique]
    run = typed("run", *words, "--prompt", "w9 w8 " * 60, "--max-new-tokens", "4")
    assert run.returncode == 0, run.stderr


def test_a_training_that_was_broken_off_measures_nothing_again(train: Typed, data: Path) -> None:
    """Nor does one of other settings lose what there is."""
    words = ["--tokens", "200", "--to", "1.1x", "--steps", "3", "--step-tokens", "150"]
    assert train("--tokens", "200").returncode == 0
    adapter, state = data / "made.safetensors", data / "made.safetensors.training"
    state.write_bytes(b"broken")
    before = adapter.read_bytes()
    done = train(*words)
    assert done.returncode == 2
    assert "is damaged" in done.stderr.replace("\n", " ")
    assert (adapter.read_bytes(), state.read_bytes()) == (before, b"broken")


def test_an_interrupted_training_says_how_it_goes_on(
    train: Typed, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--tokens", "200", "--to", "1.1x", "--steps", "3", "--step-tokens", "150"]
    step = Trainer.step

    def interrupted(trainer: Trainer, ids: torch.Tensor) -> Point:
        if len(trainer.history) == 2:
            raise KeyboardInterrupt
        return step(trainer, ids)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        for _ in range(2):  # no step was done in between
            done = train(*words)
            assert done.returncode == 130
            assert "2 of 3 steps are saved: the same command goes on there." in done.stderr
    done = train(*words)
    assert done.returncode == 0, done.stderr
    assert "Going on at step 3 of 3." in done.stderr


@pytest.mark.parametrize(
    ("words", "predictor"), [([], "linear"), (["--to", "1.1x", "--steps", "1"], "dms")]
)
def test_what_uses_an_adapter_can_be_copied(
    train: Typed, data: Path, words: list[str], predictor: str
) -> None:
    """However long its line is."""
    sized = ["--step-tokens", "150"] if words else []
    adapter = data / (20 * "long ")
    done = train("--tokens", "200", *words, *sized, "--output", str(adapter))
    assert done.returncode == 0, done.stderr
    used = f"dms:adapter={adapter},predictor={predictor},window="
    assert shlex.split(done.stderr.splitlines()[-1]) == ["--technique", f"{used}TOKENS"]
    assert parse(f"{used}80")


def test_a_training_is_the_same_whenever_it_begins(train: Typed, data: Path) -> None:
    """At once, or from an adapter that is there."""
    words = ["--tokens", "200", "--to", "1.1x", "--steps", "2", "--step-tokens", "150"]
    adapter = data / "made.safetensors"
    made: list[Adapter] = []
    for first in (["--tokens", "200"], words):
        adapter.unlink(missing_ok=True)
        assert train(*first).returncode == 0
        if first != words:
            assert train(*words).returncode == 0
        made.append(ADAPTERS.load(str(adapter)))
    assert made[0].record == made[1].record
    assert numpy.array_equal(made[0].predictors["dms"], made[1].predictors["dms"])


@pytest.mark.parametrize(
    "other",
    [[], ["--pieces", "3"], ["--to", "1.2x", "--steps", "1", "--step-tokens", "150"]],
    ids=" ".join,
)
def test_a_trained_predictor_is_never_written_over(
    train: Typed, data: Path, other: list[str]
) -> None:
    """Not even one that cannot be loaded."""
    adapter = data / "made.safetensors"
    content = save({"dms": numpy.ones(3, numpy.int8)})
    adapter.write_bytes(content)
    done = train("--tokens", "200", *other)
    assert done.returncode == 2
    assert "holds a trained predictor" in done.stderr
    assert "name another --output, or remove the file" in done.stderr.replace("\n", " ")
    assert adapter.read_bytes() == content


def test_a_table_says_how_the_heads_share(train: Typed) -> None:
    done = train("--tokens", "200")
    assert done.returncode == 0, done.stderr
    assert "windows: least" in done.stdout
    assert "use it by" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tokens", "300"], "reads 256 at most"),
        (["--data", "nowhere"], "no folder"),
        (["--output", "/nowhere/made.safetensors"], "Cannot write"),
        (["--tokens", "100"], "at least 128 are needed"),
        (["--to", "much"], "how many times smaller"),
        (["--to", "nan"], "how many times smaller"),
        (["--to", "8x", "--step-tokens", "300"], "--step-tokens 300"),
        (["--to", "8x", "--step-tokens", "150", "--tokens", "200"], "below the least window, 64"),
        (["--to", "1.5x", "--step-tokens", "100"], "--step-tokens 100: at least 128"),
        (["--plot", "drawn.svg"], "--plot is of a training: add --to"),
        (["--steps", "100"], "--steps is of a training: add --to"),
        (["--step-tokens", "150"], "--step-tokens is of a training: add --to"),
    ],
)
def test_bad_input_is_our_error(train: Typed, words: list[str], said: str) -> None:
    done = train(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr


def test_texts_that_are_short_are_our_error(train: Typed, data: Path) -> None:
    """Before anything is measured."""
    for file in data.rglob("*.txt"):
        file.write_text("w9 w8 w7 " * 50)
    done = train("--tokens", "200")
    assert done.returncode == 2
    assert "No text is 200 tokens long: ask for fewer with --tokens" in done.stderr
    done = train("--tokens", "150", "--to", "1.5x", "--step-tokens", "200")
    assert done.returncode == 2
    assert "ask for fewer with --step-tokens" in done.stderr
    assert not (data / "made.safetensors").exists()


@pytest.mark.parametrize(
    ("family", "said"), [("mistral", "cannot act on this model"), ("gemma2", "caps its attention")]
)
def test_a_model_that_cannot_be_measured_is_refused_by_its_config(
    typed: Typed, model_folder: Callable[[str], Path], data: Path, family: str, said: str
) -> None:
    folder = copytree(model_folder(family), data / "model")
    (folder / "tokenizer.json").unlink()  # of what is read after the config
    done = typed("train", "dms", str(folder), "--data", str(data))
    assert done.returncode == 2
    assert said in done.stderr.replace("\n", " ")


def test_other_texts_of_the_same_names_are_measured(train: Typed, data: Path) -> None:
    assert train("--tokens", "200").returncode == 0
    before = (data / "made.safetensors").read_bytes()
    assert train("--tokens", "200").returncode == 0
    assert (data / "made.safetensors").read_bytes() == before
    (data / "one.txt").write_text("w7 w8 w9 w10 w11 " * 80)
    assert train("--tokens", "200").returncode == 0
    assert (data / "made.safetensors").read_bytes() != before
