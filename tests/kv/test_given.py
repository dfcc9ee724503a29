"""Caches that users give to a model whose entries are kept in ours."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from transformers import DynamicCache, StaticCache

from ullage.errors import TechniqueError
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.preface import read_before
from ullage.kv.prefaced import prefaced
from ullage.techniques.dms.settings import DMS

IDS = torch.randint(6, 64, (1, 12), generator=torch.Generator().manual_seed(1))
KINDS = ["preface", "rows"]


def acting(model: Any, kind: str) -> AbstractContextManager[None]:
    if kind == "rows":
        return DMS(kept=0.25, window=4).attach(model)
    preface = read_before(model, [7, 8, 9], [1, 2], [0.0, 0.0])
    return prefaced(model, lambda ids: preface if ids[0] == IDS[0, 0] else None, "a test")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("configured", [True, False])
def test_an_empty_cache_of_the_users_is_filled(
    tiny_model: Callable[..., Any], kind: str, configured: bool
) -> None:
    """So that what it goes on with is what it has read."""
    model, _ = tiny_model("llama")
    with acting(model, kind):
        whole = model(IDS).logits
        mine = DynamicCache(config=model.config) if configured else DynamicCache()
        output = model(IDS[:, :8], **cache_argument(model, mine))
        assert output.past_key_values is mine
        assert mine.get_seq_length() == 8
        rest = model(IDS[:, 8:], **cache_argument(model, mine)).logits
    torch.testing.assert_close(rest, whole[:, 8:], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["none", "its own", "dynamic", "offloaded"])
def test_generating_fills_whichever_dynamic_cache(
    tiny_model: Callable[..., Any], kind: str, how: str
) -> None:
    model, _ = tiny_model("llama")
    mine = DynamicCache(config=model.config)
    given = {"none": {}, "its own": cache_argument(model, mine)}
    with acting(model, kind):
        expected = model.generate(IDS, max_new_tokens=8, do_sample=False)
        named = given.get(how, {"cache_implementation": how})
        text = model.generate(IDS, max_new_tokens=8, do_sample=False, **named)
        assert torch.equal(text, expected)
        if how == "its own":
            assert mine.get_seq_length() == 19  # the last token is not read yet
            read = {"attention_mask": torch.ones_like(text), **cache_argument(model, mine)}
            more = model.generate(text, max_new_tokens=2, do_sample=False, **read)
            longer = model.generate(IDS, max_new_tokens=10, do_sample=False)
            assert torch.equal(more, longer)
    assert not torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), expected)


def test_a_filled_cache_may_be_begun_from_twice(tiny_model: Callable[..., Any]) -> None:
    """As a prompt that several questions share is: with copies."""
    model, _ = tiny_model("llama")
    with acting(model, "preface"):
        mine = DynamicCache()
        model(IDS[:, :8], **cache_argument(model, mine))
        rests = [
            model(IDS[:, 8:], **cache_argument(model, copy.deepcopy(mine))).logits for _ in range(2)
        ]
    assert torch.equal(*rests)
    assert mine.get_seq_length() == 8


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_static_cache_is_refused_where_it_would_not_be_read(
    tiny_model: Callable[..., Any], family: str
) -> None:
    """And is the model's own where nothing is to be read."""
    model, _ = tiny_model(family)
    other = IDS.flip(1)
    how = {"max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    own = model.generate(other, **how)

    def static() -> dict[str, Any]:
        return cache_argument(model, StaticCache(config=model.config, max_cache_len=20))

    with acting(model, "preface"):
        assert torch.equal(model.generate(other, **how), own)
        with pytest.raises(TechniqueError, match=r"a test .* given StaticCache\. Give none"):
            model.generate(IDS, **how)
        with pytest.raises(TechniqueError, match="given StaticCache"):
            model(IDS, **static())
        assert isinstance(model(other, **static()).past_key_values, StaticCache)
    with acting(model, "rows"), pytest.raises(TechniqueError, match="given StaticCache"):
        model(other, **static())


def test_what_another_filled_is_no_place_for_rows(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama")
    filled = model(IDS).past_key_values
    with acting(model, "rows"), pytest.raises(TechniqueError, match="given DynamicCache"):
        model(IDS, **cache_argument(model, filled))
    assert not isinstance(filled, PagedCache)
