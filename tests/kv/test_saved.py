"""Sequences of whole models in files: they go on to the bit, and a bad file is refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from ullage import ModelSpec
from ullage.errors import BudgetExceeded, InputError, TechniqueError
from ullage.kv import attention
from ullage.kv.cache import PagedCache, Sequence, cache_argument
from ullage.kv.pool import KVPool
from ullage.kv.saved import FromFile, write
from ullage.specs.saved import Record, read_saved
from ullage.techniques.camelot.settings import CAMELoT

TinyModel = Callable[..., tuple[Any, ModelSpec]]
TEXT = torch.randint(6, 64, (1, 150), generator=torch.Generator().manual_seed(1))
BANK = CAMELoT(slots=24, segment=16, recent=8)
PICKY = CAMELoT(slots=24, segment=16, top_k=2, count_bias=True)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


def record_of(spec: ModelSpec, tokens: int) -> Record:
    shape = (spec.num_layers, spec.num_kv_heads, spec.head_dim)
    return Record(spec.name, *shape, "f", "{}", "camelot", "fp32", tokens, None, "book.txt", "s")


def cache_of(spec: ModelSpec, technique: CAMELoT = BANK, dtype: str = "float32") -> PagedCache:
    pool = KVPool(200, spec.head_dim, DTYPES[dtype])
    return PagedCache(spec, pool, technique.rows(spec))


@torch.inference_mode()
def read(model: Any, cache: PagedCache, sequence: Sequence, ids: torch.Tensor) -> torch.Tensor:
    """Logits [1, T, V], in chunks of 20."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    parts = []
    for chunk in ids.split(20, dim=1):
        cache.activate([sequence])
        parts.append(model(chunk, **cache_argument(model, cache)).logits)
    return torch.cat(parts, dim=1)


@pytest.fixture
def saved(tiny_model: TinyModel, tmp_path: Path) -> Path:
    """70 tokens, read by the tiny llama."""
    model, spec = tiny_model("llama")
    with BANK.attach(model):
        cache = cache_of(spec)
        sequence = cache.open(150)
        read(model, cache, sequence, TEXT[:, :70])
    write(tmp_path / "book.bank", record_of(spec, 70), sequence)
    return tmp_path / "book.bank"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("stop", [1, 3, 15, 16, 17, 40, 63, 64, 111])
@pytest.mark.parametrize(("family", "technique"), [("llama", PICKY), ("gemma3_text", BANK)])
def test_a_saved_text_goes_on_as_if_it_had_never_been_away(
    tiny_model: TinyModel, tmp_path: Path, family: str, technique: CAMELoT, dtype: str, stop: int
) -> None:
    model, spec = tiny_model(family)
    path = tmp_path / "book.bank"
    with technique.attach(model):
        cache = cache_of(spec, technique, dtype)
        sequence = cache.open(150)
        read(model, cache, sequence, TEXT[:, :stop])
        write(path, record_of(spec, stop), sequence)
        expected = read(model, cache, sequence, TEXT[:, stop:])
        other = cache_of(spec, technique, dtype)
        again = FromFile(read_saved(path)).opened(other, 150)
        assert again.length == stop
        assert torch.equal(read(model, other, again, TEXT[:, stop:]), expected)
    again.close()
    other.pool.check_integrity(all_free=True)
    assert list(tmp_path.iterdir()) == [path]


def test_others_can_read_the_file(saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        assert file.metadata()["format"] == "ullage-bank-2"
        assert json.loads(file.metadata()["record"])["tokens"] == 70
        assert file.get_tensor("0.ring.keys").shape == (2, 24, 8)


def test_each_sequence_that_begins_with_a_text_goes_its_own_way(
    tiny_model: TinyModel, saved: Path
) -> None:
    """From the file as from a sequence that is held; neither changes by it."""
    model, spec = tiny_model("llama")
    one, two = TEXT[:, 70:100], TEXT[:, 100:130]
    content = saved.read_bytes()
    with BANK.attach(model):
        cache = cache_of(spec)
        held = FromFile(read_saved(saved)).opened(cache, 120)
        alone = {}
        for question in (one, two):
            sequence = FromFile(read_saved(saved)).opened(cache, 120)
            alone[question] = read(model, cache, sequence, question)
            sequence.close()
        first, second = held.opened(cache, 120), held.opened(cache, 120)
        assert torch.equal(read(model, cache, first, one), alone[one])
        assert torch.equal(read(model, cache, second, two), alone[two])
        assert not torch.equal(alone[one], alone[two])
        assert held.length == 70
        assert torch.equal(read(model, cache, held, one), alone[one])
    for sequence in (held, first, second):
        sequence.close()
    cache.pool.check_integrity(all_free=True)
    assert saved.read_bytes() == content


def test_a_closed_sequence_or_another_engines_is_no_start(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    cache, other = cache_of(spec), cache_of(spec)
    with BANK.attach(model):
        sequence = cache.open(40)
        read(model, cache, sequence, TEXT[:, :20])
        with pytest.raises(InputError, match="in the engine that read it"):
            sequence.opened(other, 40)
        sequence.close()
        with pytest.raises(InputError, match="while it is open"):
            sequence.opened(cache, 40)


@pytest.mark.parametrize("held", [False, True])
def test_a_pool_that_is_full_takes_nothing(tiny_model: TinyModel, saved: Path, held: bool) -> None:
    model, spec = tiny_model("llama")
    cache = cache_of(spec)
    with BANK.attach(model):
        sequence = FromFile(read_saved(saved)).opened(cache, 150)
    start = sequence if held else FromFile(read_saved(saved))
    cache.pool.take(cache.pool.free_blocks - 5)
    with pytest.raises(BudgetExceeded):
        start.opened(cache, 150)
    assert cache.pool.free_blocks == 5


def test_a_file_of_other_settings_or_entries_is_refused(tiny_model: TinyModel, saved: Path) -> None:
    for cache in (
        cache_of(tiny_model("llama")[1], dtype="int8"),
        cache_of(tiny_model("llama")[1], PICKY),
        cache_of(tiny_model("gemma3_text")[1]),
    ):
        with pytest.raises(InputError, match=r"it has no .* Run what it was read with"):
            FromFile(read_saved(saved)).opened(cache, 150)
        cache.pool.check_integrity(all_free=True)


def test_one_other_byte_anywhere_is_found(tiny_model: TinyModel, saved: Path) -> None:
    whole = saved.read_bytes()
    data = 8 + int.from_bytes(whole[:8], "little")
    cache = cache_of(tiny_model("llama")[1])
    for at in (*range(0, data, 37), *range(data, len(whole), 997), len(whole) - 1):
        saved.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(InputError):
            FromFile(read_saved(saved)).opened(cache, 150)
        cache.pool.check_integrity(all_free=True)


def test_a_tensor_by_another_name_is_refused(tiny_model: TinyModel, saved: Path) -> None:
    whole, found = saved.read_bytes(), read_saved(saved)
    cache = cache_of(tiny_model("llama")[1])
    assert "0.angles.first" in {stored.name for stored in found.tensors}
    for stored in found.tensors:
        name = f'"{stored.name}"'.encode()
        saved.write_bytes(whole.replace(name, name.swapcase()))
        with pytest.raises(InputError):
            FromFile(read_saved(saved)).opened(cache, 150)


@pytest.mark.parametrize("kept", [0, 7, 8, 300, 5000, -1])
def test_a_file_that_is_cut_short_is_refused(saved: Path, kept: int) -> None:
    saved.write_bytes(saved.read_bytes()[:kept])
    with pytest.raises(InputError, match="No bank can be read"):
        read_saved(saved)


def test_a_file_that_is_cut_short_meanwhile_is_refused(tiny_model: TinyModel, saved: Path) -> None:
    found, cache = read_saved(saved), cache_of(tiny_model("llama")[1])
    saved.write_bytes(saved.read_bytes()[:-5])
    with pytest.raises(InputError, match="cut short"):
        FromFile(found).opened(cache, 150)
    cache.pool.check_integrity(all_free=True)


def test_what_is_broken_off_leaves_the_file_as_it_was(
    tiny_model: TinyModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, spec = tiny_model("llama")
    before = saved.read_bytes()
    dense = PagedCache(spec, KVPool(50, spec.head_dim, torch.float32)).open(20)
    with pytest.raises(TechniqueError):
        write(saved, record_of(spec, 1), dense)
    cache = cache_of(spec)
    sequence = FromFile(read_saved(saved)).opened(cache, 150)

    def broken_off(_: torch.Tensor) -> memoryview:
        raise KeyboardInterrupt

    monkeypatch.setattr("ullage.kv.saved._bytes_of", broken_off)
    with pytest.raises(KeyboardInterrupt):
        write(saved, replace(record_of(spec, 70), document="other"), sequence)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_link_stays_one(tiny_model: TinyModel, saved: Path) -> None:
    """What it names is written."""
    _, spec = tiny_model("llama")
    link = saved.with_name("link")
    link.symlink_to(saved)
    sequence = FromFile(read_saved(saved)).opened(cache_of(spec), 150)
    write(link, replace(record_of(spec, 70), document="other"), sequence)
    assert link.is_symlink()
    assert read_saved(saved).record.document == "other"
