"""A GGUF header is believed only as far as the file bears it out."""

import contextlib
import struct
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ullage.errors import CheckpointError, ModelError, UnknownArchitecture
from ullage.specs.families import spec_from_config
from ullage.specs.gguf import _TYPES, SkippedArray, read_header
from ullage.specs.gguf_model import config_from_gguf, spec_from_gguf
from ullage.specs.sources import resolve

U32, STRING, ARRAY, F32 = 4, 8, 9, 6
HIDDEN, INNER, LAYERS, VOCAB = 64, 96, 2, 50

METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "llama.block_count": (U32, LAYERS),
    "llama.context_length": (U32, 256),
    "llama.embedding_length": (U32, HIDDEN),
    "llama.feed_forward_length": (U32, INNER),
    "llama.attention.head_count": (U32, 4),
    "llama.attention.head_count_kv": (U32, 2),
    "llama.rope.freq_base": (F32, 10000.0),
    "general.languages": (ARRAY, (STRING, ["en"])),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, [f"token{i}" for i in range(VOCAB * 2)])),
    "tokenizer.ggml.scores": (ARRAY, (F32, [0.0] * 100)),
}


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(kind: int, content: Any) -> bytes:
    if kind == STRING:
        return string(content)
    if kind == ARRAY:
        of, items = content
        return struct.pack("<IQ", of, len(items)) + b"".join(value(of, item) for item in items)
    return struct.pack({U32: "<I", F32: "<f"}[kind], content)


def entry(key: str, kind: int, content: Any) -> bytes:
    return string(key) + struct.pack("<I", kind) + value(kind, content)


def info(name: str, dims: list[int], kind: int, offset: int) -> bytes:
    return (
        string(name)
        + struct.pack("<I", len(dims))
        + struct.pack(f"<{len(dims)}Q", *dims)
        + struct.pack("<IQ", kind, offset)
    )


def llama_tensors() -> dict[str, list[int]]:
    """GGUF order: the fastest dimension first."""
    tensors = {"token_embd.weight": [HIDDEN, VOCAB], "output_norm.weight": [HIDDEN]}
    for layer in range(LAYERS):
        tensors |= {
            f"blk.{layer}.attn_q.weight": [HIDDEN, HIDDEN],
            f"blk.{layer}.attn_k.weight": [HIDDEN, HIDDEN // 2],
            f"blk.{layer}.attn_v.weight": [HIDDEN, HIDDEN // 2],
            f"blk.{layer}.attn_output.weight": [HIDDEN, HIDDEN],
            f"blk.{layer}.ffn_gate.weight": [HIDDEN, INNER],
            f"blk.{layer}.ffn_up.weight": [HIDDEN, INNER],
            f"blk.{layer}.ffn_down.weight": [INNER, HIDDEN],
            f"blk.{layer}.attn_norm.weight": [HIDDEN],
            f"blk.{layer}.ffn_norm.weight": [HIDDEN],
        }
    return tensors


def gguf(
    metadata: dict[str, tuple[int, Any]] = METADATA,
    tensors: dict[str, list[int]] | None = None,
    version: int = 3,
) -> bytes:
    """A whole file, every tensor F32 and its data zeros."""
    tensors = llama_tensors() if tensors is None else tensors
    infos, offset = b"", 0
    for name, dims in tensors.items():
        infos += info(name, dims, 0, offset)
        size = 4
        for dim in dims:
            size *= dim
        offset += -(-size // 32) * 32
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(entry(key, *content) for key, content in metadata.items()) + infos
    return head + bytes(-len(head) % 32 + offset)


def header_of(*, tensors: int = 0, keys: int = 0, rest: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + rest + bytes(64)


def one_tensor(dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return header_of(tensors=1, rest=info("t", dims, kind, offset))


@pytest.fixture
def write(tmp_path: Path) -> Callable[[bytes], Path]:
    def write(content: bytes) -> Path:
        path = tmp_path / "model.gguf"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize("version", [2, 3])
def test_spec_is_that_of_the_config(write: Callable[[bytes], Path], version: int) -> None:
    spec = spec_from_gguf(write(gguf(version=version)))
    expected = spec_from_config(
        {
            "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
            "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
            "vocab_size": VOCAB, "max_position_embeddings": 256, "tie_word_embeddings": True,
        },
        name=spec.name,
        source=spec.source,
    )  # fmt: skip
    assert spec == replace(expected, checkpoint_bytes=4 * expected.parameters)
    assert spec.dtype == "fp32"


def test_types_are_those_of_ggml() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    theirs = {int(kind): (kind.name, *sizes) for kind, sizes in GGML_QUANT_SIZES.items()}
    assert theirs == _TYPES


def parts(folder: Path, count: int = 2) -> list[Path]:
    """The llama in `count` files, as llama.cpp splits it."""
    tensors = list(llama_tensors().items())
    files = []
    for number in range(count):
        metadata = METADATA if number == 0 else {}
        metadata = metadata | {"split.count": (U32, count), "split.no": (U32, number)}
        files.append(folder / f"tiny-{number + 1:05}-of-{count:05}.gguf")
        files[-1].write_bytes(gguf(metadata, dict(tensors[number::count])))
    return files


def test_a_model_in_parts(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    spec = spec_from_gguf(first)
    assert spec.checkpoint_bytes == 4 * spec.parameters
    assert resolve(str(tmp_path)).parameters == spec.parameters
    with pytest.raises(CheckpointError, match="name the first"):
        spec_from_gguf(second)
    second.unlink()
    with pytest.raises(CheckpointError, match="No GGUF file"):
        spec_from_gguf(first)


def test_a_part_that_holds_the_same_again(tmp_path: Path) -> None:
    first, second = parts(tmp_path)
    second.write_bytes(gguf({}, {"token_embd.weight": [HIDDEN, VOCAB]}))
    with pytest.raises(CheckpointError, match="twice"):
        spec_from_gguf(first)


def test_header_keeps_short_arrays_and_places_tensors(write: Callable[[bytes], Path]) -> None:
    path = write(gguf())
    header = read_header(path)
    assert header.metadata["general.languages"] == ["en"]
    assert header.metadata["tokenizer.ggml.tokens"] == SkippedArray(VOCAB * 2)
    embedding, norm = header.tensors[:2]
    assert embedding.shape == (VOCAB, HIDDEN)
    assert norm.offset == embedding.offset + embedding.nbytes
    assert header.tensors[-1].offset + header.tensors[-1].nbytes == path.stat().st_size


def test_untied_head_is_seen(write: Callable[[bytes], Path]) -> None:
    spec = spec_from_gguf(write(gguf(tensors=llama_tensors() | {"output.weight": [HIDDEN, VOCAB]})))
    assert not spec.tie_embeddings


@pytest.mark.parametrize(
    ("arch", "family", "extra", "windows"),
    [
        ("qwen2", "qwen2", {}, (None, None)),
        ("qwen3", "qwen3", {"attention.key_length": (U32, 32)}, (None, None)),
        ("gemma", "gemma", {"attention.key_length": (U32, 32)}, (None, None)),
        ("gemma2", "gemma2", {"attention.sliding_window": (U32, 16)}, (16, None)),
        ("gemma3", "gemma3_text", {"attention.sliding_window": (U32, 8)}, (8, 8)),
        ("phi2", "phi", {}, (None, None)),
        ("phi3", "phi3", {"attention.sliding_window": (U32, 32)}, (32, 32)),
        ("gpt2", "gpt2", {"attention.head_count_kv": (U32, 4)}, (None, None)),
    ],
)
def test_every_architecture_finds_its_family(
    write: Callable[[bytes], Path],
    arch: str,
    family: str,
    extra: dict[str, tuple[int, Any]],
    windows: tuple[int | None, ...],
) -> None:
    metadata = {key.replace("llama", arch): pair for key, pair in METADATA.items()}
    metadata |= {"general.architecture": (STRING, arch)}
    metadata |= {f"{arch}.{key}": pair for key, pair in extra.items()}
    embedding = {"token_embd.weight": [HIDDEN, VOCAB]}
    header = read_header(write(gguf(metadata, embedding)))
    spec = spec_from_config(config_from_gguf(header))
    rest = {"rest": [spec.parameters - VOCAB * HIDDEN], "rope_freqs.weight": [8]}
    found = spec_from_gguf(write(gguf(metadata, embedding | rest)))
    assert found.parameters == spec.parameters
    assert (found.family, found.windows) == (family, windows)
    assert found.head_dim == extra.get("attention.key_length", (U32, 16))[1]


LIES = {
    "empty": b"",
    "magic": b"GGML" + gguf()[4:],
    "version 1": gguf(version=1),
    "big endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    "2^60 tensors": header_of(tensors=1 << 60),
    "2^60 keys": header_of(keys=1 << 60),
    "65,536 tensors that are not there": header_of(tensors=65_536),
    "string of 2^60 bytes": header_of(keys=1, rest=struct.pack("<Q", 1 << 60)),
    "string past the end": header_of(keys=1, rest=struct.pack("<Q", 10_000)),
    "array of 2^60 numbers": header_of(
        keys=1, rest=string("a") + struct.pack("<IIQ", ARRAY, U32, 1 << 60)
    ),
    "array of 2^60 strings": header_of(
        keys=1, rest=string("a") + struct.pack("<IIQ", ARRAY, STRING, 1 << 60)
    ),
    "long string in a long array": header_of(
        keys=1,
        rest=string("a")
        + struct.pack("<IIQQ", ARRAY, STRING, 65, (1 << 64) - 1)
        + bytes(65 * 8),
    ),
    "array of arrays": header_of(keys=1, rest=string("a") + struct.pack("<IIQ", ARRAY, ARRAY, 1)),
    "unknown value type": header_of(keys=1, rest=string("a") + struct.pack("<I", 99)),
    "long array of an unknown type": header_of(
        keys=1, rest=string("a") + struct.pack("<IIQ", ARRAY, 99, 65)
    ),
    "key twice": header_of(keys=2, rest=entry("a", U32, 1) * 2),
    "no dimensions": one_tensor([]),
    "five dimensions": one_tensor([1] * 5),
    "2^32 - 1 dimensions": header_of(tensors=1, rest=string("t") + b"\xff" * 4),
    "a zero dimension": one_tensor([0, 4]),
    "product overflows": one_tensor([1 << 33, 1 << 33]),
    "unknown tensor type": one_tensor([1], kind=999),
    "removed tensor type": one_tensor([32], kind=4),
    "half a block": one_tensor([33], kind=2),
    "data past the end": one_tensor([1 << 20]),
    "offset past the end": one_tensor([1], offset=1 << 63),
    "offset not aligned": one_tensor([1], offset=1),
    "tensor twice": header_of(tensors=2, rest=info("t", [1], 0, 0) + info("t", [1], 0, 32)),
    "tensors overlap": header_of(tensors=2, rest=info("t", [9], 0, 0) + info("u", [1], 0, 32)),
    "alignment of zero": gguf(METADATA | {"general.alignment": (U32, 0)}),
    "alignment of 7": gguf(METADATA | {"general.alignment": (U32, 7)}),
    "alignment in words": gguf(METADATA | {"general.alignment": (STRING, "32")}),
    "alignment with a point": gguf(METADATA | {"general.alignment": (F32, 32.0)}),
    "alignment is a list": gguf(METADATA | {"general.alignment": (ARRAY, (U32, [32]))}),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_one_line(write: Callable[[bytes], Path], lie: str) -> None:
    path = write(LIES[lie])
    started = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"damaged") as caught:
        read_header(path)
    assert time.perf_counter() - started < 1
    assert "\n" not in str(caught.value)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(CheckpointError, match="No GGUF file"):
            read_header(path)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"general.architecture": (STRING, "mamba")}, UnknownArchitecture),
        ({"general.architecture": (U32, 3)}, UnknownArchitecture),
        ({"llama.expert_count": (U32, 8)}, ModelError),
        ({"llama.block_count": (U32, 3)}, CheckpointError),
        ({"llama.block_count": (STRING, "two")}, ModelError),
        ({"llama.embedding_length": (U32, 0)}, ModelError),
        ({"llama.attention.head_count": (U32, 0)}, ModelError),
        ({"llama.attention.head_count_kv": (ARRAY, (U32, [2, 2]))}, ModelError),
        ({"llama.attention.head_count_kv": (ARRAY, (U32, [2] * 65))}, ModelError),
        ({"llama.vocab_size": (U32, VOCAB + 1)}, CheckpointError),
    ],
)
def test_metadata_that_does_not_hold(
    write: Callable[[bytes], Path], change: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        spec_from_gguf(write(gguf(METADATA | change)))


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "model.gguf"


WHOLE = gguf()
HEAD_BYTES = WHOLE.rindex(b"ffn_norm.weight") + 64


@settings(max_examples=300, deadline=None)
@given(length=st.integers(0, HEAD_BYTES))
def test_every_truncation_is_refused(scratch: Path, length: int) -> None:
    scratch.write_bytes(WHOLE[:length])
    with pytest.raises(CheckpointError):
        read_header(scratch)


@settings(max_examples=500, deadline=None)
@given(
    flips=st.lists(
        st.tuples(st.integers(0, HEAD_BYTES), st.integers(1, 255)), min_size=1, max_size=4
    )
)
def test_flipped_bytes_never_crash(scratch: Path, flips: list[tuple[int, int]]) -> None:
    content = bytearray(WHOLE)
    for place, mask in flips:
        content[place] ^= mask
    scratch.write_bytes(content)
    with contextlib.suppress(ModelError):
        assert spec_from_gguf(scratch).parameters > 0


def test_a_long_vocabulary_is_skipped_fast(write: Callable[[bytes], Path]) -> None:
    words = struct.pack("<IQ", STRING, 262_144) + (struct.pack("<Q", 4) + b"word") * 262_144
    path = write(header_of(keys=1, rest=string("words") + struct.pack("<I", ARRAY) + words))
    started = time.perf_counter()
    assert read_header(path).metadata["words"] == SkippedArray(262_144)
    assert time.perf_counter() - started < 1
