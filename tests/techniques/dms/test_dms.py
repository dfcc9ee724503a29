"""DMS in whole models: the same text however it is read, batched, or generated."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from ullage import ModelSpec
from ullage.errors import InputError, TechniqueError
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks
from ullage.kv.sparse import SparseRow
from ullage.specs.families import RUNNING
from ullage.specs.survivors import SINKS
from ullage.techniques.dms.settings import DMS

TinyModel = Callable[..., tuple[Any, ModelSpec]]
TEXT = torch.randint(6, 64, (3, 150), generator=torch.Generator().manual_seed(1))
FAMILIES = [family for family in RUNNING if family != "mistral"]  # each of its layers slides
SWEEP = [DMS(kept, window) for window in (16, 128) for kept in (1.0, 0.5, 0.125)]


def cache_of(model: Any, spec: ModelSpec, technique: DMS) -> PagedCache:
    pool = HeapBlocks(spec.head_dim, model.dtype, model.device)
    return PagedCache(spec, pool, technique.rows(spec))


@torch.inference_mode()
def logits(model: Any, cache: PagedCache, ids: torch.Tensor, *sizes: int) -> torch.Tensor:
    """Logits [B, T, V] after reading `ids` in chunks of `sizes`, the last again and again."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    parts: list[torch.Tensor] = []
    at = 0
    while at < ids.shape[1]:
        size = sizes[min(len(parts), len(sizes) - 1)]
        parts.append(model(ids[:, at : at + size], **cache_argument(model, cache)).logits)
        at += size
    return torch.cat(parts, dim=1)


def survivors(cache: PagedCache) -> list[list[int]]:
    """What each head of each sparse row keeps beyond the window."""
    return [
        [head.survivors.length for head in row.heads]
        for layer in cache.paged
        for row in layer.rows
        if isinstance(row, SparseRow)
    ]


@pytest.mark.parametrize("technique", SWEEP, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_is_the_same_however_it_is_read(
    tiny_model: TinyModel, technique: DMS, batch: int
) -> None:
    model, spec = tiny_model("llama")
    ids = TEXT[:batch]
    with technique.attach(model):
        caches = [cache_of(model, spec, technique) for _ in range(3)]
        whole = logits(model, caches[0], ids, 150)
        chunks = logits(model, caches[1], ids, 40)
        tokens = logits(model, caches[2], ids, 100, 1)
    torch.testing.assert_close(chunks, whole, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(tokens, whole, atol=1e-4, rtol=1e-4)
    assert survivors(caches[0]) == survivors(caches[1]) == survivors(caches[2])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_forgets_and_goes_on(tiny_model: TinyModel, family: str) -> None:
    model, spec = tiny_model(family)
    technique = DMS(0.25, 16)
    dense = logits(model, cache_of(model, spec, technique.neutral()), TEXT[:1], 50)
    with technique.attach(model):
        cache = cache_of(model, spec, technique)
        sparse = logits(model, cache, TEXT[:1], 50)
        one_by_one = logits(model, cache_of(model, spec, technique), TEXT[:1], 1)
    assert torch.isfinite(sparse).all()
    assert not torch.allclose(sparse, dense, atol=1e-3)
    torch.testing.assert_close(one_by_one, sparse, atol=2e-3, rtol=1e-3)
    left = 150 - 16
    for heads in survivors(cache):
        assert 0 < sum(heads) <= 0.25 * (left + 64) * len(heads)


def test_a_lag_changes_who_survives(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    found = []
    for technique in (DMS(0.25, 48), DMS(0.25, 48, lag=40)):
        cache = cache_of(model, spec, technique)
        with technique.attach(model):
            found.append(logits(model, cache, TEXT[:1], 50))
            one_by_one = logits(model, cache_of(model, spec, technique), TEXT[:1], 1)
        torch.testing.assert_close(one_by_one, found[-1], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(*found)


@pytest.mark.parametrize("lag", [-1, 48, 1.0, True])
def test_a_lag_that_the_window_does_not_hold_is_our_error(lag: Any) -> None:
    with pytest.raises(TechniqueError, match="lag is a count of tokens below the window's 48"):
        DMS(0.25, 48, lag=lag)


def test_the_baseline_keeps_the_first_few_and_the_window(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    technique = DMS(0.5, 16, "window")
    cache = cache_of(model, spec, technique)
    with technique.attach(model):
        logits(model, cache, TEXT[:1], 50)
    assert survivors(cache) == [[SINKS] * spec.num_kv_heads] * spec.num_layers


def generate(model: Any, **arguments: Any) -> torch.Tensor:
    return model.generate(  # type: ignore[no-any-return]
        max_new_tokens=20, do_sample=False, pad_token_id=0, **arguments
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_plain_generate_and_padding(tiny_model: TinyModel, side: str) -> None:
    """As three texts alone; right padding leaves a gap between prompt and output, as in
    transformers, so that there only the first new token is compared."""
    model, _ = tiny_model("llama")
    lengths = [150, 90, 40]
    ids, mask = torch.zeros_like(TEXT), torch.zeros_like(TEXT)
    for row, length in enumerate(lengths):
        span = slice(150 - length, None) if side == "left" else slice(length)
        ids[row, span] = TEXT[row, :length]
        mask[row, span] = 1
    with DMS(0.25, 16).attach(model):
        alone = [generate(model, inputs=TEXT[row : row + 1, :n]) for row, n in enumerate(lengths)]
        if side == "left":
            together = generate(model, inputs=ids, attention_mask=mask)
            for row, length in enumerate(lengths):
                assert torch.equal(together[row, 150:], alone[row][0, length:])
            return
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        output = model(ids, attention_mask=mask, position_ids=positions)
    for row, length in enumerate(lengths):
        assert int(output.logits[row, length - 1].argmax()) == int(alone[row][0, length])


def test_generate_goes_on_from_the_cache_of_an_earlier_turn(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    technique = DMS(0.25, 16)
    with technique.attach(model):
        cache = cache_of(model, spec, technique)
        first = generate(model, inputs=TEXT[:1, :90], **cache_argument(model, cache))
        turn = torch.cat([first, TEXT[:1, 90:]], dim=1)
        second = generate(model, inputs=turn, **cache_argument(model, cache))
        fresh = generate(model, inputs=turn)
    assert torch.equal(second, fresh)


def test_what_was_filled_inside_goes_on_there_alone(tiny_model: TinyModel) -> None:
    """Outside, the model's own attention would see the new token and nothing else."""
    model, spec = tiny_model("llama")
    technique = DMS(0.25, 16)
    cache = cache_argument(model, cache_of(model, spec, technique))
    with torch.inference_mode():
        with technique.attach(model):
            whole = model(TEXT[:1]).logits[:, -1]
            model(TEXT[:1, :-1], **cache)
        with pytest.raises(InputError, match="inside the `with`"):
            model(TEXT[:1, -1:], **cache)
        with technique.attach(model):
            assert torch.allclose(model(TEXT[:1, -1:], **cache).logits[:, -1], whole, atol=1e-4)


def test_bytes_fall_with_what_is_kept_and_end_with_the_text(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    held, live = [], []
    ids = TEXT.flatten()[None]
    for kept in (1.0, 0.5, 0.125):
        technique = DMS(kept, 16)
        cache = cache_of(model, spec, technique)
        with technique.attach(model):
            logits(model, cache, ids, 150)
        held.append(cache.nbytes())
        live.append(cache.live_tokens())
        assert cache.kept() == live[-1] / 450
        cache.reset()
        assert cache.nbytes() == cache.live_tokens() == 0
    assert live == pytest.approx([450, 16 + 434 / 2, 16 + 434 / 8], abs=1)
    assert held[1] < 0.75 * held[0]
    assert held[2] < 0.45 * held[0]


def test_a_cache_that_generate_made_is_gone_with_it(tiny_model: TinyModel) -> None:
    model, _ = tiny_model("llama")
    with DMS(0.25, 16).attach(model):
        output = generate(model, inputs=TEXT[:1], return_dict_in_generate=True)
        cache = output.past_key_values
        assert isinstance(cache, PagedCache)
        assert cache.nbytes() > 0
        seen = weakref.ref(cache)
        del output, cache
        gc.collect()
        assert seen() is None


def test_a_full_cache_of_transformers_is_our_error(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    full = DynamicCache()
    full.update(torch.zeros(1, 2, 3, spec.head_dim), torch.zeros(1, 2, 3, spec.head_dim), 0)
    with DMS(0.25, 16).attach(model), pytest.raises(TechniqueError, match="PagedCache"):
        model(TEXT[:1], **cache_argument(model, full))


def test_a_given_cache_is_dense_again_afterwards(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    cache = cache_of(model, spec, DMS.neutral())
    never = logits(model, cache, TEXT[:1], 50)
    cache.reset()
    with DMS(0.25, 16).attach(model):
        inside = logits(model, cache, TEXT[:1], 50)
        assert sum(map(sum, survivors(cache))) > 0
    cache.reset()
    assert torch.equal(logits(model, cache, TEXT[:1], 50), never)
    assert not torch.equal(inside, never)


def test_a_given_cache_is_dense_again_after_a_step_that_failed(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    cache = cache_of(model, spec, DMS.neutral())

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    projection = model.model.layers[1].self_attn.k_proj
    hook = projection.register_forward_pre_hook(fail)
    with DMS(0.25, 16).attach(model), pytest.raises(KeyboardInterrupt):
        logits(model, cache, TEXT[:1], 50)
    hook.remove()
    cache.reset()
    logits(model, cache, TEXT[:1], 50)
    assert survivors(cache) == []


def test_a_cache_that_keeps_every_entry_is_our_error(tiny_model: TinyModel) -> None:
    """Whether it holds some already or has room for them: it would go on keeping every one."""
    model, spec = tiny_model("llama")
    filled, opened = (cache_of(model, spec, DMS.neutral()) for _ in range(2))
    logits(model, filled, TEXT[:1, :90], 50)
    opened.activate([opened.open(150)])
    held_bytes = filled.nbytes()
    for cache in (filled, opened):
        with (
            DMS(0.25, 16).attach(model),
            pytest.raises(TechniqueError, match="keeps every entry: give it an empty one"),
        ):
            logits(model, cache, TEXT[:1, 90:], 50)
    assert filled.nbytes() == held_bytes


def test_generate_goes_on_from_an_empty_cache_that_was_given(tiny_model: TinyModel) -> None:
    """In its second turn it is filled, by the first."""
    model, spec = tiny_model("llama")
    cache = cache_of(model, spec, DMS.neutral())
    with DMS(0.25, 16).attach(model):
        first = generate(model, inputs=TEXT[:1, :90], **cache_argument(model, cache))
        turn = torch.cat([first, TEXT[:1, 90:]], dim=1)
        second = generate(model, inputs=turn, **cache_argument(model, cache))
        assert torch.equal(second, generate(model, inputs=turn))


def test_to_read_without_a_cache_is_our_error(tiny_model: TinyModel) -> None:
    model, _ = tiny_model("llama")
    with DMS(0.25, 16).attach(model), pytest.raises(TechniqueError, match="use_cache=False"):
        generate(model, inputs=TEXT[:1], use_cache=False)


def test_assisted_decoding_is_refused(tiny_model: TinyModel) -> None:
    """For the model that is assisted, by another or by the text itself, and for the assistant."""
    model, _ = tiny_model("llama")
    other, _ = tiny_model("llama")
    with DMS(0.25, 16).attach(model):
        for words in ({"assistant_model": other}, {"prompt_lookup_num_tokens": 3}):
            with pytest.raises(InputError, match="leave the assistant out"):
                generate(model, inputs=TEXT[:1], **words)
        with pytest.raises(InputError, match="leave the assistant out"):
            generate(other, inputs=TEXT[:1], assistant_model=model)


def test_attaching_twice_is_our_error(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    technique = DMS(0.25, 16)
    with technique.attach(model):
        before = logits(model, cache_of(model, spec, technique), TEXT[:1], 50)
        with (
            pytest.raises(TechniqueError, match="attached to this model already"),
            DMS(0.5, 16).attach(model),
        ):
            pass
        after = logits(model, cache_of(model, spec, technique), TEXT[:1], 50)
    assert torch.equal(before, after)


def test_a_part_of_a_model_is_our_error(tiny_model: TinyModel) -> None:
    model, _ = tiny_model("llama")
    with DMS(0.25, 16).attach(model), pytest.raises(TechniqueError, match="the whole model"):
        model.model(TEXT[:1])


def test_a_model_that_is_planned_only_is_our_error() -> None:
    """Its attention may turn in another way, or be no function of ours."""
    config = AutoConfig.for_model("olmo2", hidden_size=32, intermediate_size=48, vocab_size=64,
                                  num_hidden_layers=1, num_attention_heads=4)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    with pytest.raises(TechniqueError, match="plans olmo2"), DMS(0.25, 16).attach(model):
        pass
    with DMS.neutral().attach(model):
        pass


def test_beams_go_on_from_their_own_entries(tiny_model: TinyModel) -> None:
    """A beam's text, read alone, is as likely as the beam search said."""
    model, spec = tiny_model("llama")
    technique, prompt = DMS(0.25, 16), TEXT[:1, :60]
    with technique.attach(model):
        out = model.generate(
            prompt, num_beams=3, max_new_tokens=20, pad_token_id=0, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        alone = logits(model, cache_of(model, spec, technique), out.sequences, 60, 1)
    said = alone[0, 59:-1].log_softmax(-1).gather(-1, out.sequences[0, 60:, None]).sum()
    torch.testing.assert_close(said, out.sequences_scores[0], atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("predictor", ["best", "", 3])
def test_a_predictor_that_there_is_not(predictor: Any) -> None:
    with pytest.raises(TechniqueError, match="predictor is one of"):
        DMS(0.5, 16, predictor)
