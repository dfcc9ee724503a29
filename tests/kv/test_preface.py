"""Sequences that begin behind entries of something that they have not read."""

from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.attention import of_ours
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks, KVPool
from ullage.kv.preface import Preface, read_before
from ullage.kv.prefaced import chosen, prefaced
from ullage.kv.rows import FullRow, Row
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS

IDS = torch.randint(6, 64, (2, 12), generator=torch.Generator().manual_seed(1))
TOLD = torch.randint(6, 64, (7,), generator=torch.Generator().manual_seed(2)).tolist()
FAMILIES = ["llama", "mistral", "gemma2", "gemma3_text", "qwen3"]


def always(preface: Preface | None) -> Callable[[list[int]], Preface | None]:
    return lambda ids: preface


def told(model: Any, bias: float = 0.0) -> Preface:
    return read_before(model, TOLD, range(len(TOLD)), [bias] * len(TOLD))


def only_first(preface: Preface) -> Callable[[list[int]], Preface | None]:
    """For the first of IDS, and for no other prompt."""
    return lambda ids: preface if ids == IDS[0].tolist() else None


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma"])
def test_to_begin_behind_a_text_is_to_have_read_it(
    tiny_model: Callable[..., Any], family: str
) -> None:
    model, _ = tiny_model(family)
    whole = torch.cat([torch.tensor(TOLD), IDS[0]])[None]
    expected = model(whole).logits[:, len(TOLD) :]
    with prefaced(model, always(told(model)), "a test"):
        torch.testing.assert_close(model(IDS[:1]).logits, expected, atol=1e-4, rtol=1e-4)


def test_a_bias_counts_an_entry_that_often(tiny_model: Callable[..., Any]) -> None:
    """As if so many copies of it were there."""
    model, _ = tiny_model("llama")
    kept = [2, 4]
    once = read_before(model, TOLD, kept, [float(torch.log(torch.tensor(3.0)))] * 2)
    thrice = read_before(model, TOLD, kept * 3, [0.0] * 6)
    logits = []
    for preface in (once, thrice):
        with prefaced(model, always(preface), "a test"):
            logits.append(model(IDS).logits)
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_text_may_be_read_in_parts(tiny_model: Callable[..., Any], family: str) -> None:
    """So that its passes are no larger than others are; whatever the order in which `kept` is."""
    model, _ = tiny_model(family)
    kept, bias, passes = [6, 0, 4], [0.0, 1.0, 2.0], list[int]()
    whole = read_before(model, TOLD, kept, bias)
    handle = model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    parts = read_before(model, TOLD, kept, bias, at_once=3)
    handle.remove()
    assert passes == [3, 3, 1]
    for piece, expected in zip(parts.pieces, whole.pieces, strict=True):
        torch.testing.assert_close(piece.keys, expected.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(piece.values, expected.values, atol=1e-4, rtol=1e-4)
        assert piece.bias is not None
        assert torch.equal(piece.bias, torch.tensor([[[1.0, 2.0, 0.0]]]).expand_as(piece.bias))


@pytest.mark.parametrize("family", FAMILIES)
def test_where_nothing_is_chosen_the_model_is_its_own(
    tiny_model: Callable[..., Any], family: str
) -> None:
    model, _ = tiny_model(family)
    logits = model(IDS).logits
    text = model.generate(IDS, max_new_tokens=8, do_sample=False)
    with prefaced(model, always(None), "a test"):
        assert torch.equal(model(IDS).logits, logits)
        assert isinstance(model(IDS).past_key_values, DynamicCache)
        assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), text)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_each_of_a_batch_begins_behind_its_own(
    tiny_model: Callable[..., Any], family: str, side: str
) -> None:
    model, _ = tiny_model(family)
    real = slice(5, None) if side == "left" else slice(7)
    ids, mask = IDS.clone(), torch.zeros_like(IDS)
    mask[0], mask[1, real] = 1, 1
    ids[mask == 0] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with prefaced(model, only_first(told(model)), "a test"):
        alone = model(IDS[:1]).logits
        batch = model(ids, attention_mask=mask, position_ids=positions).logits
    plain = model(IDS[1:, real]).logits
    torch.testing.assert_close(batch[:1], alone, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch[1:, real], plain, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(alone, model(IDS[:1]).logits, atol=1e-2)


def test_beside_others_nothing_of_a_row_changes(tiny_model: Callable[..., Any]) -> None:
    """A row without a preface has the same bits whether its neighbour has one or not."""
    model, spec = tiny_model("llama")
    attention.register()
    model.set_attn_implementation(attention.NAME)
    outputs = []
    for choose in (always(None), only_first(told(model))):
        cache = PagedCache(spec, HeapBlocks(spec.head_dim, torch.float32, "cpu"))
        with prefaced(model, choose, "a test"):
            first = model(IDS, **cache_argument(model, cache)).logits
            next_ids = torch.tensor([[9], [11]])
            outputs.append((first, model(next_ids, **cache_argument(model, cache)).logits))
    for without, beside in zip(*outputs, strict=True):
        assert torch.equal(without[1], beside[1])
        assert not torch.equal(without[0], beside[0])


def test_generating_goes_on_behind_it(tiny_model: Callable[..., Any]) -> None:
    """A token at a time, with beams too, as one forward pass over all of it."""
    model, _ = tiny_model("llama")
    with prefaced(model, always(told(model)), "a test"):
        text = model.generate(IDS, max_new_tokens=8, do_sample=False)
        assert torch.equal(model(text).logits[:, 11:-1].argmax(-1), text[:, 12:])
        beams = model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=2)
    assert beams.shape == text.shape
    assert not torch.equal(text, model.generate(IDS, max_new_tokens=8, do_sample=False))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    "technique",
    [DMS(kept=0.25, window=4), CAMELoT(slots=8, segment=4), CAMELoT(slots=8, segment=4, top_k=2)],
    ids=str,
)
@pytest.mark.parametrize("outside", [True, False])
def test_it_goes_with_what_keeps_few_entries(
    tiny_model: Callable[..., Any], technique: Any, dtype: torch.dtype, outside: bool
) -> None:
    """However the two are nested, and however a prompt is cut."""
    model, spec = tiny_model("llama")
    preface = told(model)
    nested = [technique.attach(model), prefaced(model, always(preface), "a test")]

    def logits(*cuts: int) -> torch.Tensor:
        cache = PagedCache(spec, HeapBlocks(spec.head_dim, dtype, "cpu"))
        parts = IDS[:1].split(cuts, dim=1)
        at, said = 0, []
        for part in parts:
            positions = torch.arange(at, at + part.shape[1])[None]
            how = cache_argument(model, cache)
            said.append(model(part, position_ids=positions, **how).logits)
            at += part.shape[1]
        return torch.cat(said, dim=1)

    with technique.attach(model):
        without = logits(12)
    with ExitStack() as stack:
        for context in nested if outside else nested[::-1]:
            stack.enter_context(context)
        once = logits(12)
        torch.testing.assert_close(logits(5, 1, 1, 5), once, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(once, without, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize(
    "technique",
    [None, DMS(kept=0.25, window=4), DMS(kept=0.25, window=16), CAMELoT(slots=8, segment=4)],
    ids=str,
)
@pytest.mark.parametrize("outside", [True, False])
def test_rows_of_a_batch_begin_again_by_themselves(
    tiny_model: Callable[..., Any], technique: Any, dtype: torch.dtype, outside: bool
) -> None:
    """Each when it says what it was told, as it would alone."""
    model, spec = tiny_model("llama")
    preface = replace(told(model), said=lambda ids: ids[-1:] == [9])
    written = torch.tensor([[8, 9, 10, 11, 12, 13], [14, 15, 16, 9, 17, 18]])
    whole = torch.cat([IDS, written], dim=1)
    mask = torch.ones_like(whole)
    mask[1, :3] = 0  # the second prompt is shorter
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def logits(rows: slice, start: int) -> torch.Tensor:
        """Behind the prompt, and each token that is written."""
        cache = PagedCache(spec, HeapBlocks(spec.head_dim, dtype, "cpu"))
        said = []
        for begin, end in ((start, 12), *((at, at + 1) for at in range(12, 18))):
            output = model(
                whole[rows, begin:end],
                attention_mask=mask[rows, start:end],
                position_ids=positions[rows, begin:end],
                **cache_argument(model, cache),
            )
            said.append(output.logits[:, -1])
        return torch.stack(said, dim=1)

    contexts = [prefaced(model, always(preface), "a test")]
    if technique is not None:
        contexts.insert(0 if outside else 1, technique.attach(model))
    with ExitStack() as stack:
        for context in contexts:
            stack.enter_context(context)
        together = logits(slice(0, 2), 0)
        alone = torch.cat([logits(slice(0, 1), 0), logits(slice(1, 2), 3)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_it_is_gone_after_an_exception(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama")
    logits, before = model(IDS).logits, model.config._attn_implementation
    preface = told(model)
    assert model.config._attn_implementation == before

    def interrupted(ids: list[int]) -> Preface:
        raise KeyboardInterrupt

    for choose in (interrupted, always(preface)):
        with suppress(KeyboardInterrupt), prefaced(model, choose, "a test"):
            model(IDS)
            assert model.config._attn_implementation == before
            raise KeyboardInterrupt
        assert torch.equal(model(IDS).logits, logits)
    with prefaced(model, always(preface), "a test"):
        with pytest.raises(IndexError):
            model(IDS + 1000)
        assert model.config._attn_implementation == before
        assert chosen(model, [7]) is preface
    assert chosen(model, [7]) is None
    assert torch.equal(model(IDS).logits, logits)


def test_it_takes_no_blocks(tiny_model: Callable[..., Any]) -> None:
    model, spec = tiny_model("llama")
    pool = KVPool(64, spec.head_dim, torch.float32)
    cache = PagedCache(spec, pool)
    preface = told(model)
    assert preface.nbytes == len(TOLD) * (2 * 2 * 2 * 8 * 4 + 2 * 4)  # and a bias a KV head
    with closing(cache.open(20)) as sequence:
        taken = pool.taken_bytes
        preface.put_before(sequence, [7] * 20)
        assert all(row.before is not None for row in sequence.copy().rows)
    assert taken
    assert all(row.before is None for row in cache.open(20).rows)


@pytest.mark.parametrize(
    "technique", [DMS.neutral(), DMS(kept=0.25, window=4), CAMELoT(slots=8, segment=4)], ids=str
)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_a_closed_sequence_holds_no_preface(
    tiny_model: Callable[..., Any], family: str, technique: Any
) -> None:
    """Its entries would live as long as whoever keeps the sequence."""
    model, spec = tiny_model(family)
    rows = {} if technique.unsupported(spec) else technique.rows(spec)
    cache = PagedCache(spec, HeapBlocks(spec.head_dim, torch.float32, "cpu"), rows)
    sequence = cache.open(20)
    told(model).put_before(sequence, [7] * 20)
    sequence.close()
    assert [row.before for row in sequence.rows] == [None, None]


def test_what_cannot_begin_behind_one_is_our_error(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama")
    preface = told(model)
    with prefaced(model, always(preface), "a test"):
        with pytest.raises(TechniqueError, match="use_cache=False"):
            model(IDS, use_cache=False)
        with (
            pytest.raises(TechniqueError, match="attached to this model already"),
            prefaced(model, always(preface), "a test"),
        ):
            pass
        cache = DynamicCache()
        attached = model(IDS[:, :4], **cache_argument(model, cache))
        assert isinstance(attached.past_key_values, PagedCache)
    with prefaced(model, always(None), "a test"):
        filled = model(IDS[:, :4]).past_key_values
    twin = cache_argument(model, model(IDS[:, :4]).past_key_values)
    expected = model(IDS[:, 4:], **twin).logits
    with prefaced(model, always(preface), "a test"):  # what is filled goes on as it began
        assert torch.equal(model(IDS[:, 4:], **cache_argument(model, filled)).logits, expected)


def test_what_is_written_sees_less_of_a_bias(tiny_model: Callable[..., Any]) -> None:
    model, _ = tiny_model("llama")
    strong, weak = (replace(told(model, bias), written_bias=0.5) for bias in (2.0, 1.0))
    with prefaced(model, always(weak), "a test"):
        by_prompt = model(IDS).logits
    logits = []
    for cuts in ((12, 1, 2), (12, 1, 1, 1), (5, 7, 1, 2)):
        with prefaced(model, always(strong), "a test"):
            cache, said = None, []
            for part in torch.cat([IDS, IDS[:, :3]], 1).split(cuts, dim=1):
                output = model(part, **({} if cache is None else cache_argument(model, cache)))
                cache = output.past_key_values
                said.append(output.logits)
            rows = cache.paged[1].rows
            assert {float(row.before.piece.bias.max()) for row in rows} == {1.0}
        logits.append(torch.cat(said, dim=1))
    for others in logits[1:]:
        torch.testing.assert_close(others, logits[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits[0][:, :12], by_prompt, atol=1e-2)


def test_what_was_said_is_seen_no_longer(tiny_model: Callable[..., Any]) -> None:
    """From the token on that says it, and by that row alone, whatever the others say."""
    model, spec = tiny_model("llama")
    preface = replace(told(model), said=lambda ids: ids[-2:] == [9, 10])
    texts = torch.tensor([[8, 9, 10, 11, 12], [9, 11, 10, 9, 13]])
    with prefaced(model, always(preface), "a test"):
        cache = PagedCache(spec, HeapBlocks(spec.head_dim, torch.float32, "cpu"))
        model(IDS, **cache_argument(model, cache))
        seen = []
        for at in range(5):
            how = cache_argument(model, cache)
            model(texts[:, at : at + 1], position_ids=torch.tensor([[12 + at]]), **how)
            seen.append([[row.before is not None for row in layer.rows] for layer in cache.paged])
    assert seen == [[[True, True]] * 2] * 2 + [[[False, True]] * 2] * 3
    text = model.generate(IDS, max_new_tokens=8, do_sample=False)
    with prefaced(model, always(replace(preface, said=lambda ids: True)), "a test"):
        behind = model.generate(IDS, max_new_tokens=8, do_sample=False, num_beams=2)
    assert behind.shape == text.shape


@pytest.mark.parametrize("how", ["begun here", "opened", "gone on"])
def test_what_goes_on_begins_as_if_behind_nothing(tiny_model: Callable[..., Any], how: str) -> None:
    """Its first token saw the preface: once that is seen no longer, it is as it is by itself. What
    was there already when the preface came saw none."""
    model, spec = tiny_model("llama")
    preface = replace(told(model), said=lambda ids: ids[-1:] == [9])
    alone = PagedCache(spec, HeapBlocks(spec.head_dim, torch.float32, "cpu"))
    cache = PagedCache(spec, HeapBlocks(spec.head_dim, torch.float32, "cpu"))
    with prefaced(model, always(None if how == "gone on" else preface), "a test"), of_ours(model):
        if how != "begun here":
            sequence = cache.open(20)
            if how == "gone on":
                cache.activate([sequence])
                model(IDS[:1, :4], **cache_argument(model, cache))
            preface.put_before(sequence, IDS[0].tolist())
            cache.activate([sequence])
        model(IDS[:1], **cache_argument(model, cache))
        behind = [first_entries(layer.rows[0]) for layer in cache.paged]
        model(torch.tensor([[8]]), **cache_argument(model, cache))
        assert all(
            torch.equal(first_entries(layer.rows[0]), own)
            for layer, own in zip(cache.paged, behind, strict=True)
        )
        model(torch.tensor([[9]]), **cache_argument(model, cache))
    with of_ours(model):
        model(IDS[:1, :1], **cache_argument(model, alone))
    for number, (layer, by_itself) in enumerate(zip(cache.paged, alone.paged, strict=True)):
        found, expected = first_entries(layer.rows[0]), first_entries(by_itself.rows[0])
        torch.testing.assert_close(found, expected)
        same = torch.allclose(found, behind[number], atol=1e-5)
        assert same == (how == "gone on" or number == 0)  # the first layer sees tokens alone


def first_entries(row: Row) -> torch.Tensor:
    """Key and value of a row's first token, [2, Hkv, D], as they are now."""
    assert isinstance(row, FullRow)
    piece = row.slots.read(0, 1)[0]
    return torch.stack([piece.keys[:, 0], piece.values[:, 0]])


def test_what_a_prompt_says_is_not_written(tiny_model: Callable[..., Any]) -> None:
    model, spec = tiny_model("llama")
    heard: list[list[int]] = []
    preface = replace(told(model), said=lambda ids: bool(heard.append(ids)))
    with prefaced(model, always(preface), "a test"):
        model.generate(IDS[:1], max_new_tokens=3, do_sample=False)
        assert [len(ids) for ids in heard] == [1, 2]
        heard.clear()
        pool = KVPool(64, spec.head_dim, torch.float32)
        cache = PagedCache(spec, pool)
        with closing(cache.open(20)) as sequence:  # read in pieces, as by an engine
            preface.put_before(sequence, IDS[0].tolist())
            for part in (IDS[:1, :7], IDS[:1, 7:11], IDS[:1, 11:], torch.tensor([[7]])):
                cache.activate([sequence])
                positions = torch.arange(sequence.length, sequence.length + part.shape[1])[None]
                model.set_attn_implementation(attention.NAME)
                model(part, position_ids=positions, **cache_argument(model, cache))
    assert heard == [[7]]


@pytest.mark.parametrize("cuts", [(1,) * 9, (1, 5, 1, 1, 1), (1, 1, 3, 3, 1)])
def test_no_more_is_asked_about_than_tells(
    tiny_model: Callable[..., Any], cuts: tuple[int, ...]
) -> None:
    """Of a long text a few tokens each time; but all that were not heard yet."""
    model, _ = tiny_model("llama")
    text = torch.arange(20, 29)[None]
    heard: list[list[int]] = []
    preface = replace(told(model), said=lambda ids: bool(heard.append(ids)), said_in=2)
    with prefaced(model, always(preface), "a test"):
        cache = model(IDS[:1]).past_key_values
        for part in text.split(cuts, dim=1):
            model(part, **cache_argument(model, cache))
    for number, ids in enumerate(heard):
        assert ids == list(range(ids[0], ids[-1] + 1))
        assert len(ids) <= 2 + 1 + max(cuts) * (max(cuts) > 1)
        before = heard[number - 1][-1] if number else 19
        assert ids[0] <= max(20, before - 1)  # and the newest two that were heard
    assert heard[-1][-1] == 28


def test_an_interrupted_pass_leaves_the_model_its_own(tiny_model: Callable[..., Any]) -> None:
    """Ctrl-C, of which torch tells no hook."""
    model, _ = tiny_model("llama")
    bare = model(IDS[1:]).logits

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with prefaced(model, only_first(told(model)), "a test"):
        handle = model.model.layers[1].register_forward_pre_hook(interrupt)
        with suppress(KeyboardInterrupt):
            model(IDS[:1])
        handle.remove()
        assert torch.equal(model(IDS[1:]).logits, bare)
