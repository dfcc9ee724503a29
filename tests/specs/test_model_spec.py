"""What holds of every spec: of stored bytes, of shared heads, of what survives a file, of names."""

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import InputError, ModelError
from ullage.specs import sources
from ullage.specs.dtypes import DTYPE_BYTES
from ullage.specs.gguf_mixtures import MIXTURES
from ullage.specs.gguf_quant import as_gguf
from ullage.specs.model import LayerCache, ModelSpec, Storage, TensorSpec
from ullage.specs.quantized import CHECKPOINT_FORMATS, as_checkpoint
from ullage.specs.sources import catalog, from_catalog, resolve

NAMES = sorted(catalog())
PLAIN = [name for name in NAMES if not resolve(name).prequantized]

storages = st.builds(
    Storage,
    st.just("x"),
    st.sampled_from([1.5625, 2, 3, 4, 4.5, 8, 8.5]),
    st.integers(0, 64),
    st.integers(0, 256),
    st.sampled_from([0.0, 1.0, 1 + 4 / 256, 2.5, 4.0]),
)
sides = st.integers(1, 700)


@given(storages, sides, sides, st.integers(0, 300), st.integers(0, 300))
def test_stored_bytes_never_fall_with_the_shape(
    storage: Storage, rows: int, columns: int, more_rows: int, more_columns: int
) -> None:
    small = storage.nbytes((rows, columns))
    assert small <= storage.nbytes((rows + more_rows, columns + more_columns))
    assert small >= rows * columns * storage.bits / 8
    assert storage.nbytes((1, rows, columns)) == small
    assert storage.nbytes((columns,)) == storage.nbytes((1, columns))


@given(
    st.integers(1, 200), st.integers(1, 600), st.integers(0, 300), st.integers(1, 64),
    st.integers(1, 64),
)  # fmt: skip
def test_devices_that_share_heads_hold_all_of_them(
    heads: int, dim: int, unsplit: int, ways: int, more: int
) -> None:
    cache = LayerCache(heads * dim + unsplit, heads=heads, unsplit=unsplit)
    on_each = cache.split_width(ways)
    assert on_each * ways >= cache.width
    assert cache.split_width(1) == cache.width
    assert unsplit + dim <= cache.split_width(ways + more) <= on_each
    if heads % ways == 0:
        assert (on_each - unsplit) * ways == heads * dim


@pytest.mark.parametrize("name", NAMES)
def test_every_cache_of_the_catalog_splits_into_whole_heads(name: str) -> None:
    for cache, _ in resolve(name).cache_kinds:
        assert (cache.width - cache.unsplit) % cache.heads == 0
        assert cache.split_width(8) * 8 >= cache.width


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_survives_a_file(name: str) -> None:
    spec = resolve(name)
    again = ModelSpec.from_json(json.loads(json.dumps(spec.to_json(), allow_nan=False)))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.weights_bytes("bf16") == spec.weights_bytes("bf16")


@given(st.sampled_from(NAMES), st.data())
def test_a_field_that_is_missing_or_of_another_type_is_named(
    name: str, data: st.DataObject
) -> None:
    written = resolve(name).to_json()
    field = data.draw(st.sampled_from(sorted(written)))
    junk = data.draw(st.sampled_from([object, [7], {"x": 1}, -1, "é", float("nan")]))
    changed = {**written, field: junk}
    if junk is object:
        del changed[field]
    elif isinstance(junk, str) and isinstance(written[field], str):
        return
    with pytest.raises(InputError, match=rf"model\.{field}"):
        ModelSpec.from_json(changed)


def spellings(name: str) -> list[str]:
    entry = catalog()[name]
    return [name, *([entry["hub"]] if "hub" in entry else []), *entry.get("aliases", ())]


@pytest.mark.parametrize("name", NAMES)
def test_every_spelling_leads_to_its_entry_in_any_case(name: str) -> None:
    tensors = resolve(name).tensors
    for spelling in spellings(name):
        for text in (spelling, spelling.upper(), f"  {spelling}\n"):
            found = from_catalog(text)
            assert found is not None
            assert found.tensors == tensors
        assert sources._index()[spelling.lower()][0] == name


@pytest.mark.parametrize("name", NAMES)
def test_every_entry_says_where_its_figures_are_from(name: str) -> None:
    entry = catalog()[name]
    assert len(entry["source"]) > 8
    assert {"config", "source"} <= set(entry) <= {
        "config", "source", "hub", "aliases", "base", "package", "file",
    }  # fmt: skip
    assert "base" not in entry or "model_type" not in entry["config"]


@pytest.mark.parametrize("text", ["", " ", "nobody/nothing", "../qwen3-8b", "/qwen3-8b", "gpt2/"])
def test_what_the_catalog_does_not_hold_is_none(text: str) -> None:
    assert from_catalog(text) is None


@given(st.sampled_from(PLAIN), st.sampled_from(sorted(CHECKPOINT_FORMATS)))
def test_a_format_changes_bytes_and_nothing_else(name: str, form: str) -> None:
    before = resolve(name)
    after = as_checkpoint(before, form)
    assert after.parameters == before.parameters
    assert after.active_parameters == before.active_parameters
    assert after.caches == before.caches
    kept = [t for t in after.tensors if t.storage is None]
    assert {t.role for t in kept} >= {"embedding", "other"} or before.family == "gpt2"
    bits = CHECKPOINT_FORMATS[form].bits
    numbers = sum(t.elements * t.count for t in after.tensors if t.storage is not None)
    saved = before.weights_bytes("bf16") - after.weights_bytes("bf16")
    # scales take between nothing and a seventh of what 8 or 4 bits save
    assert numbers * (16 - bits) / 8 * 6 / 7 <= saved <= numbers * (16 - bits) / 8
    if numbers:
        with pytest.raises(ModelError, match="quantized already"):
            as_checkpoint(after, form)


@given(st.sampled_from(PLAIN), st.sampled_from(sorted(MIXTURES)))
def test_a_mixture_takes_what_its_types_take(name: str, file_type: str) -> None:
    spec = as_gguf(resolve(name), file_type)
    for tensor in spec.tensors:
        assert tensor.storage is not None
        assert tensor.stored_bytes("bf16") >= tensor.elements * tensor.storage.bits / 8
        assert tensor.stored_bytes("bf16") == tensor.stored_bytes("fp32")
    assert spec.weights_bytes("bf16") <= 4 * spec.parameters


@pytest.mark.parametrize(
    ("tensor", "names", "stored"),
    [
        (TensorSpec("a.weight", (2, 3), "linear"), ["a.weight"], (2, 3)),
        (TensorSpec("l.{}.a", (2, 3), "linear", (0, 7)), ["l.0.a", "l.7.a"], (2, 3)),
        (TensorSpec("l.{}.e.{}.a", (2, 3), "expert", (4,), 2, 1),
         ["l.4.e.0.a", "l.4.e.1.a"], (2, 3)),
        (TensorSpec("l.{}.e", (2, 3), "expert", (4, 5), 6, 1), ["l.4.e", "l.5.e"], (6, 2, 3)),
    ],
)  # fmt: skip
def test_names_and_shapes_in_the_file(
    tensor: TensorSpec, names: list[str], stored: tuple[int, ...]
) -> None:
    assert tensor.names() == names
    assert tensor.stored_shape == stored
    in_file = len(names) * (stored[0] if len(stored) == 3 else 1)
    assert tensor.count == in_file
    assert tensor.stored_bytes("fp32") == 24


def test_a_window_keeps_no_more_than_there_is() -> None:
    cache = LayerCache(8, window=100)
    assert [cache.kept_tokens(n) for n in (0, 99, 100, 101, 10**9)] == [0, 99, 100, 100, 100]
    assert LayerCache(8).kept_tokens(10**9) == 10**9


def test_sums_are_those_of_the_changed_model() -> None:
    """Sums are cached: a copy must not keep those of its original."""
    spec = resolve("qwen3-0.6b")
    assert spec.weights_bytes("bf16") == 2 * spec.parameters
    first = spec.tensors[0]
    less = replace(spec, tensors=spec.tensors[1:], caches=spec.caches[1:])
    assert less.weights_bytes("bf16") == 2 * (spec.parameters - first.elements)
    assert sum(count for _, count in less.cache_kinds) == spec.num_layers - 1
    assert less != spec


def test_an_empty_model_has_no_width() -> None:
    empty: Any = replace(resolve("gpt2"), caches=(), tensors=())
    assert (empty.kv_width, empty.state_bytes, empty.windows) == (0, 0, ())
    assert [empty.weights_bytes(dtype) for dtype in DTYPE_BYTES] == [0] * len(DTYPE_BYTES)
