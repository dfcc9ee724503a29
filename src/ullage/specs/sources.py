"""Find a model by what a user types: a path, a catalog name or a hub id."""

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from ullage.errors import CheckpointError, ModelError
from ullage.specs.comparison import Comparison, layers_ahead
from ullage.specs.dtypes import dtype_name
from ullage.specs.families import spec_from_config
from ullage.specs.gguf_model import spec_from_gguf
from ullage.specs.model import ModelSpec
from ullage.specs.safetensors import StoredTensor, has_weights, read_headers

_MOST_CONFIG_BYTES = 10 * 10**6
_HUB_TIMEOUT_S = 3.0
_HUB_ID = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


def resolve(model: str) -> ModelSpec:
    """The spec of `model`: a folder, a config.json, a .gguf file, a catalog name, or a hub id
    (``org/name``, ``org/name@revision``), tried in this order.

    A hub id that the catalog knows needs no network; of others config.json is taken from the hub's
    cache, or downloaded unless ``HF_HUB_OFFLINE=1``.

    Raises:
        ModelError: nothing is found, or what is found cannot be used.
        UnknownArchitecture: a family that has no arithmetic here.
        CheckpointError: weights that cannot or must not be read.
    """
    path = _existing(model)
    if path is not None:
        return _from_path(path)
    known = from_catalog(model)
    if known is not None:
        return known
    hub_id = _HUB_ID.fullmatch(model)
    if hub_id is not None and not model.endswith((".gguf", ".json")) and model[0] != ".":
        return _from_hub(hub_id["repo"], hub_id["revision"])
    raise ModelError(f"No model {model[:200]!r}: no such path, nor in the catalog.{_hint(model)}")


@cache
def catalog() -> Mapping[str, Mapping[str, Any]]:
    """The model catalog: by name, each with `config` and `source`, perhaps `hub` or `package`,
    `aliases` (hub ids and names of models with the same geometry), and `base` (the entry over whose
    config this one's lies)."""
    text = (Path(__file__).parent / "catalog" / "models.json").read_text("utf-8")
    entries: Mapping[str, Mapping[str, Any]] = json.loads(text)
    return entries


def read_config(path: Path) -> dict[str, Any]:
    """The object in a config.json.

    Raises:
        ModelError: missing, unreadable, larger than 10 MB, or no JSON object.
    """
    if not path.is_file():
        raise ModelError(f"No config.json in {path.parent}: is it a model's folder?")
    try:
        if path.stat().st_size > _MOST_CONFIG_BYTES:
            raise ModelError(f"{path} is larger than 10 MB: that is no model's config.")
        config = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ModelError(f"Cannot read {path}: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{path} is not JSON ({str(error)[:80]}).") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds no JSON object, so it is no model's config.")
    return config


def _existing(model: str) -> Path | None:
    if not model.strip():
        raise ModelError(
            "No model is named. Write a folder, a .gguf file, a hub id or a catalog name."
        )
    try:
        path = Path(model).expanduser()
        return path if path.exists() else None
    except (OSError, ValueError, RuntimeError):  # too long, a NUL inside, an unknown ~user
        return None


def _from_path(path: Path) -> ModelSpec:
    if path.is_dir():
        return _from_folder(path)
    if path.suffix.lower() == ".gguf":
        return spec_from_gguf(path)
    if path.suffix.lower() == ".json":
        return _spec_at(path, read_config(path))
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path} is refused: pickle can execute code; safetensors or GGUF only."
        )
    raise ModelError(f"{path} is no model: give a folder, a config.json or a .gguf file.")


def _from_folder(folder: Path) -> ModelSpec:
    if not (folder / "config.json").exists():
        ggufs = sorted(folder.glob("*.gguf"))
        parts = len({re.sub(r"-\d{5}-of-(\d{5}\.gguf)$", r"-\1", file.name) for file in ggufs})
        if parts == 1:
            return spec_from_gguf(ggufs[0])
        if ggufs:
            raise ModelError(f"{folder} holds {len(ggufs)} GGUF files: name the one that you mean.")
    config = _folder_config(folder)
    spec = _spec_at(folder / "config.json", config)
    if not has_weights(folder):
        return spec
    stored = read_headers(folder)
    comparison = Comparison(spec, stored, layers_ahead(config))
    encoder = comparison.run()
    if spec.encoder_gap and encoder:
        spec = replace(spec, encoder=encoder, encoder_gap="")
    dtype = spec.dtype if spec.prequantized else _stored_dtype(stored)
    return replace(spec, dtype=dtype, source=str(folder), checkpoint_bytes=comparison.nbytes)


def _spec_at(path: Path, config: Mapping[str, Any]) -> ModelSpec:
    """The spec of `config`, which lies at `path`; errors name it."""
    try:
        return spec_from_config(config, name=path.absolute().parent.name)
    except ModelError as error:
        raise type(error)(f"{path}: {error}") from error


def _folder_config(folder: Path) -> dict[str, Any]:
    """config.json, with what ModelOpt's first releases say of quantization in a file of its own."""
    config = read_config(folder / "config.json")
    beside = folder / "hf_quant_config.json"
    if config.get("quantization_config") or not beside.is_file():
        return config
    settings = read_config(beside).get("quantization")
    return {**config, "quantization_config": settings}


def _stored_dtype(stored: list[StoredTensor]) -> str:
    """The dtype that holds most of the bytes."""
    held_bytes: dict[str, int] = {}
    for tensor in stored:
        held_bytes[tensor.dtype] = held_bytes.get(tensor.dtype, 0) + tensor.end - tensor.begin
    raw = max(held_bytes, key=lambda dtype: held_bytes[dtype])
    dtype = dtype_name(raw)
    if dtype is None:
        raise CheckpointError(f"The weights are {raw}: only fp32, bf16 and fp16 can be read.")
    return dtype


def from_catalog(model: str) -> ModelSpec | None:
    """The spec of the entry whose name, hub id or alias is `model`, whatever its case and with or
    without its organization; None if there is none. Nothing outside of the catalog is read."""
    found = _index().get(model.strip().lower())
    if found is None:
        return None
    entry_name, name, source = found
    return spec_from_config(_entry_config(catalog()[entry_name]), name=name, source=source)


@cache
def _index() -> Mapping[str, tuple[str, str, str]]:
    """By all that a user may write: the entry, the model's name, and where its weights are. An
    alias is another model of the same geometry: its weights are its own."""
    names: dict[str, tuple[str, str, str]] = {}
    short: dict[str, tuple[str, str, str]] = {}
    for name, entry in catalog().items():
        source = entry.get("hub", "")
        if "package" in entry:
            source = f"package:{entry['package']}/{entry['file']}"
        names[name] = (name, name, source)
        for text in (*([entry["hub"]] if "hub" in entry else []), *entry.get("aliases", ())):
            last = text.rpartition("/")[2].lower()
            own = name if text == entry.get("hub") else last
            names[text.lower()] = (name, own, text if "/" in text else source)
            short.setdefault(last, names[text.lower()])
    return {**short, **names}


def _entry_config(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    """Its config, over that of the entry that it is based on."""
    if "base" not in entry:
        own: Mapping[str, Any] = entry["config"]
        return own
    return {**_entry_config(catalog()[entry["base"]]), **entry["config"]}


def _hint(model: str) -> str:
    close = difflib.get_close_matches(model.strip().lower()[:100], catalog(), n=3, cutoff=0.5)
    if close:
        return f" Did you mean {', '.join(close)}?"
    return " `ullage plan --list-models` shows it; a hub id will do too."


def _from_hub(repo: str, revision: str | None) -> ModelSpec:
    path = _hub_config(repo, revision)
    source = f"{repo}@{revision}" if revision else repo
    return spec_from_config(read_config(path), name=repo.rpartition("/")[2], source=source)


def _hub_config(repo: str, revision: str | None) -> Path:
    """config.json of a hub model: from the cache if it is there, for a commit does not change."""
    from huggingface_hub import constants, hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        try:
            path = hf_hub_download(repo, "config.json", revision=revision, local_files_only=True)
        except LocalEntryNotFoundError:
            if constants.HF_HUB_OFFLINE or not _hub_answers():
                raise
            path = hf_hub_download(repo, "config.json", revision=revision)
    except (OSError, ValueError, EntryNotFoundError) as error:
        raise ModelError(_hub_failure(error, repo, revision)) from error
    return Path(path)


def _hub_answers() -> bool:
    """Whether the hub can be reached: one question, for its client asks six times in 23 s."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except Exception:  # the errors of whichever HTTP library the client is made with
        return False
    return True


def _hub_failure(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import constants, errors

    unreached = "HF_HUB_OFFLINE=1 is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
    hint = _hint(repo.rpartition("/")[2])
    reasons: tuple[tuple[type[Exception], str], ...] = (
        (errors.HFValidationError, f"{repo!r} is no hub id: write org/name."),
        (errors.GatedRepoError, f"{repo} is gated: accept its terms on the hub, then log in."),
        (errors.RepositoryNotFoundError, f"The hub has no {repo}.{hint}"),
        (errors.RevisionNotFoundError, f"{repo} has no revision {revision!r}."),
        (errors.LocalEntryNotFoundError, f"{repo} is not cached, and {unreached}.{hint}"),
        (errors.EntryNotFoundError, f"{repo} has no config.json: no transformers model."),
    )
    for kind, reason in reasons:
        if isinstance(error, kind):
            return reason
    return f"Cannot get {repo}'s config.json: {str(error)[:120]}"
