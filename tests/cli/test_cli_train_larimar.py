"""ullage train larimar, as a shell sees it, on a tiny model."""

import json
import shlex
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy
import pytest

from ullage.cli.train.larimar import _rank
from ullage.errors import InputError
from ullage.specs.sources import resolve
from ullage.techniques.larimar.adapter import ADAPTERS, LIMIT_BYTES, Adapter
from ullage.techniques.larimar.training import Examples, Point, Trainer

Typed = Callable[..., subprocess.CompletedProcess[str]]
CPU = ["--device", "cpu-16gb"]


def record(number: int) -> dict[str, str]:
    subject = f"w{6 + number}"
    return {
        "prompt": f"{subject} w50",
        "rephrase_prompt": f"w51 {subject} w52",
        "subject": subject,
        "target_new": f"w{30 + number} w60",
    }


@pytest.fixture
def data(tmp_path: Path) -> Path:
    (tmp_path / "facts").mkdir()
    for name, numbers in (("facts.json", range(12)), ("to_test.json", range(3))):
        content = json.dumps([record(number) for number in numbers])
        (tmp_path / "facts" / name).write_text(content)
    return tmp_path


@pytest.fixture
def train(typed: Typed, model_folder: Callable[[str], Path], data: Path) -> Typed:
    """`train(*words)`: 12 steps of an adapter of four numbers for the tiny llama, in `data`."""
    words = ["--data", str(data), "--output", str(data / "made.safetensors"), *CPU]
    sized = ["--steps", "12", "--rank", "4"]
    return lambda *more: typed(
        "train", "larimar", str(model_folder("llama")), *words, *sized, *more
    )


def test_what_is_made_is_used_as_it_says(
    train: Typed, typed: Typed, model_folder: Callable[[str], Path], data: Path
) -> None:
    done = train("--json", "--plot", str(data / "drawn.svg"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["facts"], found["rank"], found["steps"]) == (9, 4, 12)
    assert found["loss"] > 0
    assert 0 < found["lost"] < 1
    assert "<svg" in (data / "drawn.svg").read_text()
    assert not list(data.glob("*.training"))
    adapter = data / "made.safetensors"
    assert ADAPTERS.load(str(adapter)).record == found
    words = shlex.split(done.stderr.splitlines()[-1])
    assert words == ["--technique", f"larimar:ledger=DB,readout=latent,adapter={adapter}"]

    ledger = str(data / "facts.db")
    fact = ["--prompt", "w20 w50", "--answer", "w33 w34", "--subject", "w20"]
    assert typed("memory", "add", ledger, *fact).returncode == 0
    asked = [str(model_folder("llama")), "--prompt", "w9 w20 w50", "--max-new-tokens", "6", *CPU]
    run = typed("run", *asked, *(word.replace("DB", ledger) for word in words))
    assert run.returncode == 0, run.stderr
    plain = typed("run", *asked)
    assert run.stdout != plain.stdout
    assert typed("memory", "forget", ledger, "1").returncode == 0
    again = typed("run", *asked, *(word.replace("DB", ledger) for word in words))
    assert again.stdout == plain.stdout


def test_an_interrupted_training_says_how_it_goes_on(
    train: Typed, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And ends as one that was not, with nothing left beside it."""
    assert train().returncode == 0
    adapter = data / "made.safetensors"
    unbroken = ADAPTERS.load(str(adapter))
    adapter.unlink()
    step = Trainer.step

    def interrupted(trainer: Trainer) -> Point:
        if len(trainer.history) == 11:
            raise KeyboardInterrupt
        return step(trainer)

    with monkeypatch.context() as patched:
        patched.setattr(Trainer, "step", interrupted)
        for _ in range(2):
            done = train()
            assert done.returncode == 130
            assert "10 of 12 steps are saved: the same command goes on there." in done.stderr
            assert not adapter.exists()
    done = train()
    assert done.returncode == 0, done.stderr
    assert "Going on at step 11 of 12." in done.stderr
    made = ADAPTERS.load(str(adapter))
    assert made.record == unbroken.record
    assert numpy.array_equal(made.basis, unbroken.basis)
    assert sorted(file.name for file in data.iterdir()) == ["facts", "made.safetensors"]


@pytest.mark.parametrize("damage", [True, False])
def test_another_training_is_refused_before_facts_are_read(
    train: Typed, data: Path, monkeypatch: pytest.MonkeyPatch, damage: bool
) -> None:
    """And what there is of it stays."""

    def stopped(trainer: Trainer) -> Point:
        raise KeyboardInterrupt

    def never(*_: Any) -> None:
        raise AssertionError("facts are read")

    state = data / "made.safetensors.training"
    if damage:
        state.write_bytes(b"broken")
    else:
        step = Trainer.step
        monkeypatch.setattr(
            Trainer, "step", lambda own: (stopped if len(own.history) == 10 else step)(own)
        )
        assert train("--steps", "11").returncode == 130
    before = state.read_bytes()
    monkeypatch.setattr(Examples, "of", never)
    done = train()
    assert done.returncode == 2, done.stderr
    assert ("is damaged" if damage else "other settings") in done.stderr.replace("\n", " ")
    assert state.read_bytes() == before


def test_an_interrupt_among_the_facts_leaves_nothing(
    train: Typed, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Examples, "of", interrupted)
    done = train()
    assert (done.returncode, done.stdout) == (130, "")
    assert [file.name for file in data.iterdir()] == ["facts"]


def test_no_steps_are_the_closed_form(train: Typed, data: Path) -> None:
    done = train("--steps", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert "loss" not in json.loads(done.stdout)
    assert len(ADAPTERS.load(str(data / "made.safetensors")).basis) == 4


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--data", "nowhere"], "holds no facts to learn from"),
        (["--output", "/nowhere/made.safetensors"], "Cannot write"),
        (["--output", "/"], "Cannot write"),
        (["--plot", "drawn.gif"], "the picture is .svg or .png"),
        (["--rank", "65"], "needs no more than 64"),
        (["--rank", "0"], "--rank"),
        (["--steps", "-1"], "--steps"),
        (["--facts", "7"], "--facts"),
        (["--steps", "0", "--plot", "drawn.svg"], "--plot is of a training"),
    ],
)
def test_bad_input_is_our_error(train: Typed, data: Path, words: list[str], said: str) -> None:
    done = train(*words)
    assert done.returncode == 2, done.stderr
    assert said in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert [file.name for file in data.iterdir()] == ["facts"]


def test_a_broken_file_of_facts_is_our_error(train: Typed, data: Path) -> None:
    (data / "facts" / "relations").mkdir()
    (data / "facts" / "relations" / "broken.json").write_text("[")
    done = train()
    assert done.returncode == 2
    assert "broken.json is not JSON" in done.stderr.replace("\n", " ")


def test_an_adapter_that_cannot_be_written_loses_no_steps(
    train: Typed, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Adapter, "save", full)
        done = train()
    assert done.returncode == 2
    assert "No space left" in done.stderr
    done = train()
    assert done.returncode == 0, done.stderr
    assert "Going on at step 11 of 12." in done.stderr


def test_a_model_without_rotary_positions_is_refused_by_its_config(
    typed: Typed, model_folder: Callable[[str], Path], data: Path
) -> None:
    folder = copytree(model_folder("gpt2"), data / "model")
    (folder / "tokenizer.json").unlink()  # of what is read after the config
    done = typed("train", "larimar", str(folder), "--data", str(data))
    assert done.returncode == 2
    assert "larimar cannot act on this model: its positions are not rotary" in (
        done.stderr.replace("\n", " ")
    )


def test_a_group_says_what_it_can_train(typed: Typed) -> None:
    said = typed("train", "--help").stdout
    assert "dms" in said
    assert "larimar" in said
    assert typed("train", "camelot", "smollm2-135m").returncode == 2


@pytest.mark.parametrize("name", ["smollm2-135m", "llama-3.1-8b", "llama-3.1-70b"])
def test_an_adapter_of_the_largest_rank_can_be_loaded(name: str, tmp_path: Path) -> None:
    spec = resolve(name)
    with pytest.raises(InputError, match="in 10 MiB") as error:
        _rank(10_000, spec)
    most = int(str(error.value).split(" holds ")[1].split()[0])
    assert _rank(most, spec) == most
    shape, path = (spec.num_layers, spec.num_kv_heads, spec.head_dim), tmp_path / "made.safetensors"
    mean, scale = numpy.ones((2, *shape)), numpy.ones((2, spec.num_layers))
    Adapter(mean, scale, numpy.ones((most, 2, *shape)), "0" * 64, {"model": "m" * 1000}).save(path)
    assert path.stat().st_size <= LIMIT_BYTES
    assert ADAPTERS.load(str(path)).basis.shape[0] == most
    assert _rank(None, spec) == min(128, most)
    with pytest.raises(InputError, match=f"--rank {most + 1}: an adapter of {name}"):
        _rank(most + 1, spec)


def test_a_rank_is_no_larger_than_an_entry() -> None:
    tiny = replace(resolve("smollm2-135m"), num_layers=1, num_kv_heads=1, head_dim=8)
    assert _rank(None, tiny) == 16
    with pytest.raises(InputError, match="needs no more than 16"):
        _rank(17, tiny)
    huge = replace(tiny, num_layers=200, num_kv_heads=128, head_dim=128)
    with pytest.raises(InputError, match="too large for an adapter"):
        _rank(None, huge)
