"""CAMELoT in whole models: no leak, the same text however it is read, and bytes that stay."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ullage import ModelSpec
from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.banked import BankRow
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks
from ullage.specs.families import RUNNING
from ullage.techniques.camelot.overhead import state_bytes
from ullage.techniques.camelot.settings import CAMELoT
from ullage.techniques.dms.settings import DMS

TinyModel = Callable[..., tuple[Any, ModelSpec]]
TEXT = torch.randint(6, 64, (3, 150), generator=torch.Generator().manual_seed(1))
FAMILIES = [family for family in RUNNING if family not in ("mistral", "gpt2")]
FAITHFUL = CAMELoT(slots=24, segment=16)
LATE = CAMELoT(slots=24, segment=8, recent=20, centred=True, threshold=0.5)
SWEEP = [
    FAITHFUL,
    LATE,
    CAMELoT(slots=24, segment=16, top_k=1, positions="constant"),
    CAMELoT(slots=24, segment=7, recent=3, top_k=2, count_bias=True, count_cap=4),
    CAMELoT(slots=40, segment=1, threshold=2.0),
    CAMELoT(slots=40, segment=200),
]


def cache_of(
    model: Any, spec: ModelSpec, technique: CAMELoT, dtype: torch.dtype | None = None
) -> PagedCache:
    pool = HeapBlocks(spec.head_dim, dtype or model.dtype, model.device)
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


def generate(model: Any, **given: Any) -> Any:
    settings = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    return model.generate(**settings | given)


@pytest.mark.parametrize("technique", SWEEP, ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_text_is_the_same_however_it_is_read(
    tiny_model: TinyModel, technique: CAMELoT, batch: int
) -> None:
    model, spec = tiny_model("llama")
    ids = TEXT[:batch]
    with technique.attach(model):
        whole, chunks, tokens = (
            logits(model, cache_of(model, spec, technique), ids, *sizes)
            for sizes in ((150,), (40,), (100, 1))
        )
    torch.testing.assert_close(chunks, whole, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(tokens, whole, atol=1e-3, rtol=1e-3)


CHANGING = [
    ("llama", {"rope_type": "dynamic", "factor": 4.0}),
    ("phi3", {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}),
]


@pytest.mark.parametrize(("family", "rope"), CHANGING)
def test_frequencies_do_not_change_with_the_length(
    tiny_model: TinyModel, family: str, rope: dict[str, Any]
) -> None:
    """transformers takes those of a pass's last position; behind the technique it does again."""
    short = {"original_max_position_embeddings": 32}
    rope = rope | short | {"rope_theta": 10_000.0}
    model, spec = tiny_model(family, rope_parameters=rope, max_position_embeddings=32, **short)
    before = model(TEXT[:1]).logits
    with FAITHFUL.attach(model):
        whole, chunks = (
            logits(model, cache_of(model, spec, FAITHFUL), TEXT[:1], size) for size in (150, 20)
        )
    torch.testing.assert_close(chunks, whole, atol=1e-3, rtol=1e-3)
    assert torch.equal(model(TEXT[:1]).logits, before)
    assert not torch.allclose(model(TEXT[:1, :20]).logits, before[:, :20], atol=1e-3)


@pytest.mark.parametrize("technique", SWEEP, ids=str)
@pytest.mark.parametrize("at", [20, 31, 32, 97])
def test_what_comes_later_changes_nothing_before(
    tiny_model: TinyModel, technique: CAMELoT, at: int
) -> None:
    """Not what is retrieved by a later token's key either."""
    model, spec = tiny_model("llama")
    other = TEXT[:1].clone()
    other[0, at:] = TEXT[1, at:]
    with technique.attach(model):
        first, second = (
            logits(model, cache_of(model, spec, technique), ids, 150) for ids in (TEXT[:1], other)
        )
    assert torch.equal(first[:, :at], second[:, :at])
    assert not torch.equal(first[:, at], second[:, at])


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_its_bank_and_goes_on(tiny_model: TinyModel, family: str) -> None:
    model, spec = tiny_model(family)
    with LATE.attach(model):
        cache = cache_of(model, spec, LATE)
        found = logits(model, cache, TEXT[:1], 50)
        one_by_one = logits(model, cache_of(model, spec, LATE), TEXT[:1], 1)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(one_by_one, found, atol=5e-3, rtol=1e-3)
    banks = [isinstance(layer.rows[0], BankRow) for layer in cache.paged]
    assert banks == [window is None for window in spec.windows]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_room_for_all_and_nothing_alike_it_is_the_model_itself(
    tiny_model: TinyModel, family: str
) -> None:
    """Each slot at its token's own distance: keys are turned back and forth, and nothing else."""
    model, spec = tiny_model(family)
    technique = CAMELoT(slots=500, segment=16, threshold=2.0)
    dense = logits(model, cache_of(model, spec, technique.neutral()), TEXT[:1], 50)
    with technique.attach(model):
        found = logits(model, cache_of(model, spec, technique), TEXT[:1], 50, 1)
    torch.testing.assert_close(found, dense, atol=5e-3, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_before_anything_is_in_the_bank_no_bit_is_another(
    tiny_model: TinyModel, family: str
) -> None:
    model, spec = tiny_model(family)
    technique, ids = CAMELoT(slots=24, segment=16, recent=40), TEXT[:2, :48]
    dense = logits(model, cache_of(model, spec, technique.neutral()), ids, 30, 7, 1)
    with technique.attach(model):
        cache = cache_of(model, spec, technique)
        assert torch.equal(logits(model, cache, ids, 30, 7, 1), dense)
        rows = [layer.rows[0] for layer in cache.paged]
        assert {row.bank.size for row in rows if isinstance(row, BankRow)} == {0}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8, torch.float8_e4m3fn])
def test_a_pool_of_fewer_bits_is_near(tiny_model: TinyModel, dtype: torch.dtype) -> None:
    model, spec = tiny_model("llama")
    technique = CAMELoT(slots=24, segment=16, threshold=2.0)
    with technique.attach(model):
        exact = logits(model, cache_of(model, spec, technique), TEXT[:1], 50)
        found = logits(model, cache_of(model, spec, technique, dtype), TEXT[:1], 50, 1)
    assert torch.isfinite(found).all()
    agree = (found.argmax(-1) == exact.argmax(-1)).float().mean()
    assert agree > (0.7 if dtype == torch.float8_e4m3fn else 0.9)


@pytest.mark.parametrize("technique", [FAITHFUL, LATE, SWEEP[3]], ids=str)
def test_plain_generate_and_left_padding(tiny_model: TinyModel, technique: CAMELoT) -> None:
    model, _ = tiny_model("llama")
    lengths = [150, 90, 40]
    ids, mask = torch.zeros_like(TEXT), torch.zeros_like(TEXT)
    for row, length in enumerate(lengths):
        ids[row, 150 - length :] = TEXT[row, :length]
        mask[row, 150 - length :] = 1
    with technique.attach(model):
        alone = [generate(model, inputs=TEXT[row : row + 1, :n]) for row, n in enumerate(lengths)]
        together = generate(model, inputs=ids, attention_mask=mask)
    for row, length in enumerate(lengths):
        assert torch.equal(together[row, 150:], alone[row][0, length:])


def test_padding_that_positions_count_shifts_nothing(tiny_model: TinyModel) -> None:
    """As where nobody gives position_ids: the first token stands at 30."""
    model, spec = tiny_model("llama")
    mask = torch.ones(1, 180, dtype=torch.long)
    mask[0, :30] = 0
    padded = torch.cat([torch.zeros(1, 30, dtype=torch.long), TEXT[:1]], dim=1)
    with LATE.attach(model), torch.inference_mode():
        alone = logits(model, cache_of(model, spec, LATE), TEXT[:1], 150)
        cache = cache_of(model, spec, LATE)
        found = model(padded, attention_mask=mask, **cache_argument(model, cache)).logits[:, 30:]
    torch.testing.assert_close(found, alone, atol=2e-3, rtol=1e-3)


def test_beams_go_on_from_their_own_bank(tiny_model: TinyModel) -> None:
    """A beam's text, read alone, is as likely as the beam search said."""
    model, spec = tiny_model("llama")
    prompt = TEXT[:1, :60]
    with LATE.attach(model):
        out = model.generate(
            prompt, num_beams=3, max_new_tokens=20, pad_token_id=0, length_penalty=0.0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
        alone = logits(model, cache_of(model, spec, LATE), out.sequences, 60, 1)
    said = alone[0, 59:-1].log_softmax(-1).gather(-1, out.sequences[0, 60:, None]).sum()
    torch.testing.assert_close(said, out.sequences_scores[0], atol=2e-3, rtol=1e-4)


def test_a_manual_is_read_once_and_asked_twice(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    manual, questions = TEXT[:1, :120], (TEXT[1:2, :30], TEXT[2:3, :30])
    with LATE.attach(model):
        cache = cache_of(model, spec, LATE)
        logits(model, cache, manual, 50)
        cache.batch_repeat_interleave(2)
        both = logits(model, cache, torch.cat(questions), 7)
        for row, question in enumerate(questions):
            whole = torch.cat([manual, question], dim=1)
            alone = logits(model, cache_of(model, spec, LATE), whole, 50)[:, 120:]
            torch.testing.assert_close(both[row : row + 1], alone, atol=2e-3, rtol=1e-3)
        cache.reset()
        assert cache.nbytes() == cache.live_tokens() == 0
        again = logits(model, cache, manual, 50)
    with LATE.attach(model):
        fresh = logits(model, cache_of(model, spec, LATE), manual, 50)
    assert torch.equal(again, fresh)


def test_bytes_stay_however_long_a_text_is(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama", num_hidden_layers=1)
    technique = CAMELoT(slots=48, segment=32, recent=32, count_bias=True)
    held, live = [], []
    with technique.attach(model), torch.inference_mode():
        cache = cache_of(model, spec, technique)
        for _ in range(40):
            ids = torch.randint(6, 64, (1, 250))
            output = model(ids, **cache_argument(model, cache), logits_to_keep=1)
            assert output.logits.isfinite().all()
            row = cache.paged[0].rows[0]
            assert isinstance(row, BankRow)
            held.append(cache.nbytes())
            assert row.beside_bytes == state_bytes(technique.rules, spec, 250, "fp32")
            live.append(cache.live_tokens())
    assert len(set(held)) == 1
    assert max(live) <= 32 + 32 + 4 + 48


def test_a_pool_with_a_budget_is_enough_for_any_length(tiny_model: TinyModel) -> None:
    from ullage.kv.pool import KVPool

    model, spec = tiny_model("llama")
    pool = KVPool(LATE.held_blocks(spec, 10**6), spec.head_dim, model.dtype)
    cache = PagedCache(spec, pool, LATE.rows(spec))
    with LATE.attach(model):
        cache.activate([cache.open(10**6)])
        logits(model, cache, TEXT.flatten()[None].repeat(1, 3), 100)
    assert pool.free_blocks == 0
    cache.reset()
    pool.check_integrity(all_free=True)


def test_a_step_that_failed_leaves_the_model_and_a_cache_as_they_were(
    tiny_model: TinyModel,
) -> None:
    model, spec = tiny_model("llama")
    cache = cache_of(model, spec, CAMELoT.neutral())
    never = logits(model, cache, TEXT[:1], 50)
    cache.reset()

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[1].self_attn.k_proj.register_forward_pre_hook(fail)
    with FAITHFUL.attach(model), pytest.raises(KeyboardInterrupt):
        logits(model, cache, TEXT[:1], 50)
    hook.remove()
    cache.reset()
    assert torch.equal(logits(model, cache, TEXT[:1], 50), never)


@pytest.mark.parametrize("second", [FAITHFUL, DMS(0.5, 16)], ids=str)
def test_two_ways_to_keep_entries_at_once_are_our_error(
    tiny_model: TinyModel, second: CAMELoT | DMS
) -> None:
    model, _ = tiny_model("llama")
    with (
        FAITHFUL.attach(model),
        pytest.raises(TechniqueError, match="CAMELoT is attached to this model already"),
        second.attach(model),
    ):
        pass


@pytest.mark.parametrize(("family", "why"), [("gpt2", "not rotary"), ("mistral", "no layer")])
def test_a_model_that_has_nothing_for_it_is_our_error(
    tiny_model: TinyModel, family: str, why: str
) -> None:
    model, spec = tiny_model(family)
    assert why in (FAITHFUL.unsupported(spec) or "")
    with pytest.raises(TechniqueError, match=why), FAITHFUL.attach(model):
        pass
