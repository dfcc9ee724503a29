"""Tiny random models of every family, built here: no test downloads anything.

torch and transformers are imported when a fixture needs them, so that tests of the arithmetic start
at once.
"""

import functools
import json
import os
import shutil
import string
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from ullage.specs.families import spec_from_config
from ullage.specs.model import ModelSpec

# Before anything imports triton: without a GPU its programs are interpreted.
if not any(Path("/dev").glob("nvidia[0-9]*")):
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A busy machine is no failure: examples have no deadline.
settings.register_profile("ullage", deadline=None)
settings.load_profile("ullage")

_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    # Wide enough that attention decides which token comes next; 0.02 would leave that to the
    # embeddings, and tests would pass without attention.
    "initializer_range": 0.4,
    "bos_token_id": 2,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_MIXED_LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {
        "num_hidden_layers": 3, "layer_types": _MIXED_LAYERS, "sliding_window": 6, "head_dim": 8,
        "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20, "tie_word_embeddings": False,
    },
    "gemma3_text": {
        "num_hidden_layers": 3, "layer_types": _MIXED_LAYERS, "sliding_window": 6, "head_dim": 8,
        "query_pre_attn_scalar": 20, "tie_word_embeddings": False,
    },
    "phi": {"num_key_value_heads": 4},
    "phi3": {},
    "gpt2": {
        "n_embd": 32, "n_layer": 2, "n_head": 4, "n_inner": 48, "n_positions": 256,
        "num_key_value_heads": None,
    },
}  # fmt: skip


def _config(family: str) -> dict[str, Any]:
    return {"model_type": family, **_SIZES, **CONFIGS[family]}


@pytest.fixture(scope="session")
def tiny_spec() -> Callable[..., ModelSpec]:
    """`tiny_spec(family, **changes)`: the spec of a tiny model, without torch."""

    def make(family: str, **changes: Any) -> ModelSpec:
        return spec_from_config({**_config(family), **changes}, name=f"tiny-{family}")

    return make


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., tuple[Any, ModelSpec]]:
    """`tiny_model(family, **changes)`: a new random fp32 model, always the same one, and its
    spec."""

    def make(family: str, **changes: Any) -> tuple[Any, ModelSpec]:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.set_num_threads(1)  # threads cost more than these models do
        config = AutoConfig.for_model(**_config(family) | changes)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config).eval()
        return model, spec_from_config(model.config.to_dict(), name=f"tiny-{family}")

    return make


@pytest.fixture(scope="session")
def model_folder(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., tuple[Any, ModelSpec]]
) -> Callable[..., Path]:
    """`model_folder(family, dtype, rope)`: a tiny model as people publish them: config,
    safetensors, tokenizer. Shared by all tests: copy it before changing it. Token 1 ends a text.
    `rope` is the JSON of the config's ``rope_parameters``."""

    @functools.cache
    def save(family: str, dtype: str = "float32", rope: str = "") -> Path:
        import torch

        folder = tmp_path_factory.mktemp("models") / family
        changes = {"rope_parameters": json.loads(rope), **json.loads(rope)} if rope else {}
        model, _ = tiny_model(family, eos_token_id=1, **changes)
        model.to(getattr(torch, dtype)).save_pretrained(folder)
        _tokenizer().save_pretrained(folder)
        return folder

    return save


@pytest.fixture
def copied_folder(model_folder: Callable[[str], Path], tmp_path: Path) -> Path:
    """A copy of the tiny llama's folder, to be changed."""
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "copied"))


def _tokenizer() -> Any:
    """A word a token: <pad>, <eos>, <bos>, <unk>, user, assistant, w6 .. w63."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [
        "<pad>",
        "<eos>",
        "<bos>",
        "<unk>",
        "user",
        "assistant",
        *(f"w{n}" for n in range(6, 64)),
    ]
    core = Tokenizer(models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
    )
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message.role }} {{ message.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant{% endif %}"
    )
    return tokenizer


@pytest.fixture(scope="session")
def gguf_file(
    tmp_path_factory: pytest.TempPathFactory, tiny_model: Callable[..., tuple[Any, ModelSpec]]
) -> Path:
    """The tiny llama as llama.cpp's converter would write it, in F32, with a byte-level BPE of
    letters. Shared by all tests: copy it before changing it."""
    from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map

    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    model, spec = tiny_model("llama")
    writer = GGUFWriter(file, "llama")
    writer.add_block_count(spec.num_layers)
    writer.add_context_length(spec.max_context_tokens)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_feed_forward_length(spec.intermediate_size)
    writer.add_head_count(spec.num_heads)
    writer.add_head_count_kv(spec.num_kv_heads)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10_000.0)
    letters = ["\u0120", "\u010a", *string.ascii_letters, "th", *"12345"]  # space, newline, ...
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<pad>", "<eos>", "<bos>", "<unk>", *letters])
    writer.add_token_types([3] * 4 + [1] * len(letters))
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, spec.num_layers)
    for name, weight in model.state_dict().items():
        for projection, heads in (("q_proj", spec.num_heads), ("k_proj", spec.num_kv_heads)):
            if projection in name:
                weight = _interleaved(weight, heads)
        writer.add_tensor(names.get_name(name, (".weight",)), weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _interleaved(weight: Any, heads: int) -> Any:
    """Rows in llama.cpp's order, which rotates neighbours; transformers rotates halves."""
    rows, columns = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, columns)
    return halves.swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="session")
def peak_of() -> Callable[[Callable[[], Any]], int]:
    """`peak_of(function)`: the most bytes that tensors made inside `function` held together."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.live: dict[StorageWeakRef, int] = {}
            self.peak_bytes = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            kwargs = kwargs or {}
            with self:  # what is made of other operations is counted operation by operation
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
            given = {storage_of(leaf) for leaf in tree_leaves((args, kwargs)) if is_tensor(leaf)}
            result = func(*args, **kwargs)
            for leaf in tree_leaves(result):
                if is_tensor(leaf) and storage_of(leaf) not in given:
                    self.live[storage_of(leaf)] = leaf.untyped_storage().nbytes()
            self.live = {ref: size for ref, size in self.live.items() if not ref.expired()}
            self.peak_bytes = max(self.peak_bytes, sum(self.live.values()))
            return result

    import torch

    def is_tensor(leaf: Any) -> bool:
        return isinstance(leaf, torch.Tensor)

    def storage_of(tensor: Any) -> StorageWeakRef:
        return StorageWeakRef(tensor.untyped_storage())

    def measure(function: Callable[[], Any]) -> int:
        with Tracker() as tracker:
            function()
        return tracker.peak_bytes

    return measure


@pytest.fixture(scope="session")
def triton_kernel() -> Any:
    """Triton's kernel for tensors on CPU: on a GPU, compiled, where there is one."""
    pytest.importorskip("triton")
    import torch

    from ullage.kv.kernels import Piece, triton

    if not torch.cuda.is_available():
        return triton.attend

    def on_gpu(piece: Piece) -> Piece:
        beside = {"mask": piece.mask, "bias": piece.bias, "query": piece.query}
        there = {name: None if part is None else part.cuda() for name, part in beside.items()}
        entries = Piece.of(piece.each(lambda tensor: tensor.cuda()), piece.causal)
        return replace(entries, heads=piece.heads, **there)

    def attend(query: Any, pieces: list[Piece], *how: Any) -> Any:
        return triton.attend(query.cuda(), [on_gpu(piece) for piece in pieces], *how).cpu()

    return attend


@pytest.fixture(scope="session")
def ullage() -> Callable[..., subprocess.CompletedProcess[str]]:
    """`ullage(*words, stdin=, **environment)`: the command as a shell runs it, but for bugs: their
    traceback is shown."""

    def run(
        *words: str, stdin: str | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "ullage", *words],
            capture_output=True, text=True, check=False, input=stdin,
            env={**os.environ, "ULLAGE_DEBUG": "1", **environment},
        )  # fmt: skip

    return run


@pytest.fixture
def ullage_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder that ullage takes for the user's cache."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("ULLAGE_CACHE", str(folder))
    return folder
