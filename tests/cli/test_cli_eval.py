"""ullage eval, as a shell sees it, on a tiny model."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Typed = Callable[..., subprocess.CompletedProcess[str]]
DMS = "dms:kept=0.25,window=16"
SIZED = ["--device", "cpu-16gb", "--tokens", "128", "--beyond", "32", "--limit", "2"]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        text = " ".join(f"w{6 + (n * n + ord(name)) % 58}" for n in range(300))
        (tmp_path / f"{name}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def perplexity(typed: Typed, model_folder: Callable[[str], Path], data: Path) -> Typed:
    """`perplexity(*words)`: the suite on the tiny llama and two texts."""
    words = ["eval", str(model_folder("llama")), "--suite", "perplexity", "--data", str(data)]
    return lambda *more: typed(*words, *SIZED, *more)


def test_both_sides_stand_in_json_with_their_bytes(perplexity: Typed) -> None:
    done = perplexity("--technique", DMS, "--json")
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["techniques"] == [DMS]
    assert (found["tokens"], found["beyond_tokens"], found["dtype"]) == (128, 32, "fp32")
    lines = {(line["task"], line["metric"]): line for line in found["comparisons"]}
    assert {task for task, _ in lines} == {"a", "b", "all"}
    for line in lines.values():
        assert line["compressed_bytes"] < line["dense_bytes"]
        assert line["change"]["n"] == 95 * (4 if line["task"] == "all" else 2)
    assert {row["metric"] for row in found["quality"]} == {"perplexity %", "mean KLD", "99% KLD"}
    assert found["quality"][0]["change"] == lines["all", "perplexity"]["change"]["value"]


def test_the_table_has_a_line_a_metric_and_says_what_was_measured(perplexity: Typed) -> None:
    done = perplexity("--technique", DMS)
    assert done.returncode == 0, done.stderr
    for words in ("live KV", "perplexity", "bits per byte", "mean KLD", "99% KLD", DMS):
        assert words in done.stdout
    assert "scored beyond 32 of 128 tokens" in done.stdout
    assert max(map(len, done.stdout.splitlines()[:-2])) <= 80


def test_formats_of_weights_are_those_of_both_sides(perplexity: Typed) -> None:
    pytest.importorskip("torchao")
    words = ["--technique", "dms:kept=1.0", "--weights", "int8", "--json"]
    found = json.loads(perplexity(*words).stdout)
    plain = json.loads(perplexity("--technique", "dms:kept=1.0", "--json").stdout)
    assert all(line["change"]["value"] == 0 for line in found["comparisons"])
    assert found["comparisons"][0]["dense"] != plain["comparisons"][0]["dense"]


def test_weights_as_a_technique_are_measured_against_whole_ones(perplexity: Typed) -> None:
    pytest.importorskip("torchao")
    found = json.loads(perplexity("--technique", "quantization:scheme=int8", "--json").stdout)
    line = found["comparisons"][0]
    assert line["change"]["value"] != 0
    assert line["dense_bytes"] == line["compressed_bytes"]  # of KV entries, which stay


def test_with_a_bank_texts_are_longer_than_the_model_was_trained_on(perplexity: Typed) -> None:
    """The tiny one on 256 tokens."""
    bank = "camelot:slots=16,segment=16"
    done = perplexity("--technique", bank, "--tokens", "290", "--json")
    assert done.returncode == 0, done.stderr
    line = json.loads(done.stdout)["comparisons"][0]
    assert 0 < line["compressed_bytes"] < 0.3 * line["dense_bytes"]


def test_a_picture_is_drawn(perplexity: Typed, tmp_path: Path) -> None:
    done = perplexity("--technique", DMS, "--plot", str(tmp_path / "found.svg"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found.svg").read_text().lstrip().startswith("<?xml")


REFUSED: dict[str, tuple[list[str], str]] = {
    "no technique": ([], "nothing to compare"),
    "no such technique": (["--technique", "dsm"], "Did you mean dms?"),
    "twice": (["--technique", DMS, "--technique", DMS], "asked for twice"),
    "suite": (["--technique", DMS, "--suite", "mmlu"], "mmlu"),
    "no folder": (["--technique", DMS, "--data", "/no/such/folder"], "no folder"),
    "no essays": (["--technique", DMS, "--suite", "retrieval"], "no folder"),
    "no tables": (["--technique", DMS, "--suite", "glue"], "no folder"),
    "context": (["--technique", DMS, "--tokens", "257"], "more than the 256"),
    "format": (["--technique", DMS, "--kv-cache-dtype", "fp8"], "CUDA alone, not on cpu"),
    "too little to score": (["--technique", DMS, "--beyond", "127"], "nothing to score"),
    "tokens": (["--technique", DMS, "--tokens", "few"], "token count"),
    "picture": (["--technique", DMS, "--plot", "a.docx"], ".svg or .png"),
    "place": (["--technique", DMS, "--plot", "/no/such/folder/a.svg"], "Cannot write"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_measured_is_refused_before_weights_are_read(
    perplexity: Typed, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setattr("ullage.runtime.reader.Reader.read", lambda *_: pytest.fail("read"))
    words, says = REFUSED[case]
    done = perplexity(*words)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert says in done.stderr
