"""Whatever a user hands over: one or two lines, exit code 2, no traceback, nothing left behind."""

import json
import os
import pickle
import resource
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Ullage = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = [["plan"], ["run", "--prompt", "w6"], ["audit"]]
SIZED = ["--device", "cpu-16gb"]


def assert_refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = done.stderr.strip().splitlines()
    assert 1 <= len([line for line in lines if not line.startswith("Converting")]) <= 2
    assert says in done.stderr


def change_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text()) | changes
    kept = {key: value for key, value in config.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(kept))


def cut_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def pickle_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": 1}))


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "empty folder": (empty, "No config.json"),
    "config cut": (lambda folder: os.truncate(folder / "config.json", 40), "is not JSON"),
    "config without a key": (
        lambda folder: change_config(folder, hidden_size=...),
        "no 'hidden_size'",
    ),
    "config with a lie": (lambda folder: change_config(folder, vocab_size=-5), "vocab_size"),
    "unknown family": (lambda folder: change_config(folder, model_type="mamba9"), "mamba9"),
    "foreign code": (
        lambda folder: change_config(folder, auto_map={"AutoModelForCausalLM": "evil.Evil"}),
        "never executes",
    ),
    "weights cut": (cut_weights, "damaged"),
    "weights of another shape": (lambda folder: change_config(folder, vocab_size=65), "65"),
    "weights missing": (lambda folder: change_config(folder, num_hidden_layers=3), "lacks"),
    "pickle": (pickle_weights, "pickle can execute code"),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("command", COMMANDS, ids=lambda words: words[0])
def test_a_damaged_model_folder(
    ullage: Ullage, copied_folder: Path, command: list[str], damage: str
) -> None:
    spoil, says = DAMAGES[damage]
    spoil(copied_folder)
    before = sorted(copied_folder.iterdir())
    assert_refused(ullage(command[0], str(copied_folder), *command[1:], *SIZED), says)
    assert sorted(copied_folder.iterdir()) == before


def test_a_damaged_tokenizer(ullage: Ullage, copied_folder: Path) -> None:
    (copied_folder / "tokenizer.json").write_text("{")
    assert_refused(ullage("run", str(copied_folder), "--prompt", "w6", *SIZED), "tokenizer")


def lying(head: bytes, tensors: int, keys: int) -> bytes:
    return head[:8] + struct.pack("<QQ", tensors, keys) + head[24:]


GGUF_LIES: dict[str, Callable[[bytes], bytes]] = {
    "2^60 tensors": lambda file: lying(file, 1 << 60, 5),
    "2^60 keys": lambda file: lying(file, 5, 1 << 60),
    "a name of 2^62 bytes": lambda file: file[:24] + struct.pack("<Q", 1 << 62) + file[32:],
    "cut in its header": lambda file: file[:500],
    "cut in its weights": lambda file: file[:-5000],
    "no GGUF": lambda file: b"GGML" + file[4:],
    "nothing": lambda file: b"",
}


@pytest.mark.parametrize("lie", GGUF_LIES)
@pytest.mark.parametrize("command", COMMANDS[:2], ids=lambda words: words[0])
def test_a_lying_gguf_file(
    ullage: Ullage, gguf_file: Path, tmp_path: Path, command: list[str], lie: str
) -> None:
    file, cache = tmp_path / "lie.gguf", tmp_path / "cache"
    file.write_bytes(GGUF_LIES[lie](gguf_file.read_bytes()))
    start_s = time.perf_counter()
    done = ullage(command[0], str(file), *command[1:], *SIZED, ULLAGE_CACHE=str(cache))
    assert_refused(done, "lie.gguf")
    assert time.perf_counter() - start_s < 20
    assert not cache.exists()


def test_a_cache_folder_that_cannot_be_written(
    ullage: Ullage, gguf_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    cache = tmp_path / "file" / "cache"
    done = ullage("run", str(gguf_file), "--prompt", "a", *SIZED, ULLAGE_CACHE=str(cache))
    assert_refused(done, "Set ULLAGE_CACHE to one that is writable")


def limited(*words: str, cache: Path, file_bytes: int) -> subprocess.CompletedProcess[str]:
    """The command where no file may grow past `file_bytes`: writes fail midway, as on a full
    disk."""
    return subprocess.run(
        [sys.executable, "-m", "ullage", *words],
        capture_output=True, text=True, check=False, env=os.environ | {"ULLAGE_CACHE": str(cache)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes)),
    )  # fmt: skip


@pytest.mark.skipif(os.name != "posix", reason="resource limits")
@pytest.mark.parametrize("file_bytes", [0, 3000, 50_000])
def test_a_full_disk_during_conversion(
    ullage: Ullage, gguf_file: Path, tmp_path: Path, file_bytes: int
) -> None:
    words = ["run", str(gguf_file), "--prompt", "a", "--max-new-tokens", "1", *SIZED]
    assert_refused(
        limited(*words, cache=tmp_path / "cache", file_bytes=file_bytes), "Cannot convert"
    )
    assert list((tmp_path / "cache" / "converted").iterdir()) == []
    assert ullage(*words, ULLAGE_CACHE=str(tmp_path / "cache")).returncode == 0


def interrupted(
    words: list[str], after_line: str, wait_s: float, **environment: str
) -> tuple[int, str]:
    """Ctrl-C `wait_s` after a line with `after_line` came on stderr: exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "ullage", *words],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment,
        start_new_session=True,
        # a shell's background jobs ignore it, and would hand that down
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if after_line in line:
            break
    time.sleep(wait_s)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the whole group
    _, rest = process.communicate(timeout=60)
    return process.returncode, "".join(lines) + rest


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("wait_s", [0.0, 2.0])
def test_an_interrupt_while_the_prompt_is_read(
    copied_folder: Path, tmp_path: Path, wait_s: float
) -> None:
    change_config(copied_folder, max_position_embeddings=100_000)
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("w6 " * 60_000)
    words = ["run", str(copied_folder), "--prompt-file", str(prompt), "--prefill-chunk", "4"]
    code, errors = interrupted([*words, *SIZED], "planned peak", wait_s)
    assert code == 130
    assert "Traceback" not in errors


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("wait_s", [0.0, 2.0])
def test_an_interrupt_during_an_audit(copied_folder: Path, tmp_path: Path, wait_s: float) -> None:
    written = ["--plot", str(tmp_path / "a.svg"), "--write", str(tmp_path / "a.json")]
    code, errors = interrupted(["audit", str(copied_folder), *written, *SIZED], "lengths", wait_s)
    assert code == 130
    assert "Traceback" not in errors
    assert not list(tmp_path.glob("a.*"))


@pytest.mark.skipif(os.name != "posix", reason="signals")
@pytest.mark.parametrize("wait_s", [0.0, 1.5])
def test_an_interrupt_during_conversion(gguf_file: Path, tmp_path: Path, wait_s: float) -> None:
    words = ["run", str(gguf_file), "--prompt", "a", *SIZED]
    code, errors = interrupted(words, "Converting", wait_s, ULLAGE_CACHE=str(tmp_path))
    assert code == 130
    assert "Traceback" not in errors
    assert list((tmp_path / "converted").iterdir()) == []
