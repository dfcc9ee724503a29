"""Whatever a user types for a model ends in a spec or in an error of ours."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture
from ullage.specs.sources import resolve

CONFIG: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def write_config(folder: Path, config: Any = CONFIG) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return folder


def weights_of(folder: Path, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        tensor.name.format(layer): torch.zeros(tensor.shape, dtype=dtype)
        for tensor in resolve(str(folder)).tensors
        for layer in range(tensor.count)
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache, and no network."""
    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def cache_config(cache: Path, repo: str, commit: str = "a" * 40) -> None:
    place = cache / f"models--{repo.replace('/', '--')}"
    write_config(place / "snapshots" / commit)
    (place / "refs").mkdir()
    (place / "refs" / "main").write_text(commit)


def test_folder_without_weights_is_its_config(folder: Path) -> None:
    spec = resolve(str(folder))
    assert (spec.name, spec.source, spec.dtype) == ("tiny", "", "fp32")
    assert resolve(str(folder / "config.json")) == spec


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_dtype_is_the_configs(folder: Path, key: str) -> None:
    write_config(folder, {**CONFIG, key: "bfloat16"})
    assert resolve(str(folder)).dtype == "bf16"


def test_a_broken_config_is_named(tmp_path: Path) -> None:
    write_config(tmp_path, {"model_type": "llama"})
    for typed in (tmp_path, tmp_path / "config.json"):
        with pytest.raises(ModelError, match=f"^{tmp_path}/config.json: .*no 'hidden_size'"):
            resolve(str(typed))


def test_a_name_like_no_other_is_told_of_the_catalog() -> None:
    with pytest.raises(ModelError, match="--list-models"):
        resolve("zzqqx")


def test_dtype_is_that_of_most_stored_bytes(folder: Path) -> None:
    weights = weights_of(folder, torch.float16)
    weights["model.norm.weight"] = weights["model.norm.weight"].float()
    save_file(weights, folder / "model.safetensors")
    spec = resolve(str(folder))
    assert (spec.dtype, spec.source) == ("fp16", str(folder))


def test_a_tied_head_may_be_stored_too(folder: Path) -> None:
    weights = weights_of(folder)
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors")
    assert resolve(str(folder)).parameters == sum(map(torch.numel, weights_of(folder).values()))


def test_a_checkpoint_of_the_bare_model_is_the_same_model(folder: Path) -> None:
    weights = {name.removeprefix("model."): weight for name, weight in weights_of(folder).items()}
    save_file(weights, folder / "model.safetensors")
    assert resolve(str(folder)).source == str(folder)


def test_gemma3_with_vision_is_read_for_its_text(tmp_path: Path) -> None:
    text = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 9}
    folder = write_config(tmp_path, {"model_type": "gemma3", "text_config": text})
    weights = {f"language_model.{name}": weight for name, weight in weights_of(folder).items()}
    weights["vision_tower.patch.weight"] = torch.zeros(3)
    save_file(weights, folder / "model.safetensors")
    assert resolve(str(folder)).dtype == "bf16"


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    weights = weights_of(folder)
    del weights[name]
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=f"lacks {name}"):
        resolve(str(folder))


def test_a_tensor_too_many_is_named(folder: Path) -> None:
    weights = weights_of(folder) | {"model.layers.2.mlp.up_proj.weight": torch.zeros(48, 32)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"holds model\.layers\.2"):
        resolve(str(folder))


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    weights = weights_of(folder) | {"model.norm.weight": torch.zeros(31)}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is \[31\].* \[32\]"):
        resolve(str(folder))


def test_integer_weights_are_refused(folder: Path) -> None:
    save_file(weights_of(folder, torch.int8), folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="I8"):
        resolve(str(folder))


def test_pickled_weights_are_refused(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="pickle"):
            resolve(str(path))


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", '"llama"', "[" * 100_000, " " * 10_000_001, '{"model_type": "\ud800"}'],
    ids=["empty", "open", "list", "number", "string", "deep", "11 MB", "surrogate"],
)
def test_a_config_that_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_bytes(text.encode("utf-8", errors="surrogatepass"))
    with pytest.raises(ModelError):
        resolve(str(tmp_path))


def test_a_config_in_another_encoding(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(json.dumps(CONFIG).encode("utf-16"))
    with pytest.raises(ModelError, match="not JSON"):
        resolve(str(tmp_path))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_config(folder: Path) -> None:
    (folder / "config.json").chmod(0)
    with pytest.raises(ModelError, match="Cannot read"):
        resolve(str(folder))


def test_a_folder_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"No config\.json"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"No config\.json"):
        resolve(str(tmp_path))


def test_a_folder_of_gguf_files(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"a\.gguf is damaged"):
        resolve(str(tmp_path))
    (tmp_path / "b.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelError, match="holds 2 GGUF files"):
        resolve(str(tmp_path))


@pytest.mark.parametrize(
    "model",
    ["", " ", "\0", "a" * 5000, "no such model", "./none", "/none/config.json", "none.gguf",
     "~nobody-here/x", "a/b/c", "../x", "org/", "/", "org/name@", "org/na me", "é/ü", "-", "--"],
)  # fmt: skip
def test_nonsense_is_an_error_of_ours(offline: Path, model: str) -> None:
    with pytest.raises(ModelError) as caught:
        resolve(model)
    assert str(caught.value).count("\n") < 2


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ModelError, match="is no model"):
        resolve(str(tmp_path / "notes.txt"))


def test_a_slip_of_the_pen_is_answered_with_a_name() -> None:
    with pytest.raises(ModelError, match=r"Did you mean llama-3\.1-8b"):
        resolve("lama-3.1-8b")


def test_a_path_goes_before_the_catalog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(tmp_path / "gpt2")
    monkeypatch.chdir(tmp_path)
    assert resolve("gpt2").family == "llama"


def test_a_hub_id_comes_from_the_cache(offline: Path) -> None:
    cache_config(offline, "org/tiny")
    spec = resolve("org/tiny")
    assert (spec.name, spec.source, spec.num_layers) == ("tiny", "org/tiny", 2)
    assert resolve(f"org/tiny@{'a' * 40}").source == f"org/tiny@{'a' * 40}"


def test_a_hub_id_that_is_not_cached_says_why(offline: Path) -> None:
    with pytest.raises(ModelError, match="org/none is not cached, and HF_HUB_OFFLINE=1 is set"):
        resolve("org/none")
    cache_config(offline, "org/tiny")
    with pytest.raises(ModelError, match="not cached"):
        resolve("org/tiny@v2")


def test_a_hub_that_does_not_answer_is_not_waited_for(
    offline: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    start_s = time.perf_counter()
    with pytest.raises(ModelError, match="org/none is not cached, and the hub does not answer"):
        resolve("org/none")
    assert time.perf_counter() - start_s < 8


def test_a_hub_id_of_the_catalog_needs_no_cache(offline: Path) -> None:
    assert resolve("Qwen/Qwen3-8B").source == "Qwen/Qwen3-8B"


def test_an_unknown_family_on_the_hub(offline: Path) -> None:
    cache_config(offline, "org/tiny")
    shutil.rmtree(offline / "models--org--tiny" / "snapshots" / ("a" * 40))
    write_config(
        offline / "models--org--tiny" / "snapshots" / ("a" * 40), {**CONFIG, "model_type": "rwkv"}
    )
    with pytest.raises(UnknownArchitecture, match="rwkv"):
        resolve("org/tiny")


def test_resolving_stays_light() -> None:
    code = (
        "import sys; from ullage.specs.sources import resolve; resolve('gpt2');"
        "from ullage.specs.device import find_device; find_device('h100');"
        "print([name for name in ('torch', 'transformers', 'gguf', 'huggingface_hub', 'numpy')"
        " if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == "[]"
