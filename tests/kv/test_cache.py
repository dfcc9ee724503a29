"""PagedCache inside plain `model.generate`, against transformers' own cache and attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ullage.errors import BudgetExceeded, InputError
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import KVPool
from ullage.kv.rows import NewTokens
from ullage.specs.blocks import sequence_blocks, sequence_bytes
from ullage.specs.families import RUNNING
from ullage.specs.model import ModelSpec

TinyModel = Callable[..., tuple[Any, ModelSpec]]
PROMPT = torch.arange(6, 26)[None]  # [1, 20], more than three windows


def paged_cache(
    spec: ModelSpec, tokens: int = 64, sequences: int = 1, dtype: torch.dtype = torch.float32
) -> PagedCache:
    return PagedCache(spec, KVPool(sequences * sequence_blocks(spec, tokens), spec.head_dim, dtype))


def paged(model: Any) -> Any:
    attention.register()
    model.set_attn_implementation(attention.NAME)
    return model


def generate(model: Any, ids: torch.Tensor, **arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy tokens [B, N] and their logits [B, 12, V]."""
    out = model.generate(
        ids,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
        **arguments,
    )
    return out.sequences, torch.stack(out.logits, dim=1)


@pytest.mark.parametrize("family", RUNNING)
def test_generate_is_transformers_own(family: str, tiny_model: TinyModel) -> None:
    model, spec = tiny_model(family)
    model.set_attn_implementation("eager")  # sdpa would ignore Gemma 2's cap
    tokens, logits = generate(model, PROMPT)
    ours, our_logits = generate(paged(model), PROMPT, **cache_argument(model, paged_cache(spec)))
    torch.testing.assert_close(our_logits, logits, atol=1e-3, rtol=1e-4)
    assert torch.equal(ours, tokens)


@pytest.mark.parametrize("family", RUNNING)
def test_left_padded_batch_is_transformers_own(family: str, tiny_model: TinyModel) -> None:
    model, spec = tiny_model(family)
    model.set_attn_implementation("eager")
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[1, :5], mask[2, :19] = 0, 0
    ids = torch.cat([PROMPT, PROMPT.flip(1), PROMPT + 9]) * mask
    tokens, logits = generate(model, ids, attention_mask=mask)
    cache = paged_cache(spec, sequences=3)
    ours, our_logits = generate(
        paged(model), ids, attention_mask=mask, **cache_argument(model, cache)
    )
    torch.testing.assert_close(our_logits, logits, atol=1e-3, rtol=1e-4)
    assert torch.equal(ours, tokens)


def test_a_mask_is_looked_up_anew_for_other_tokens(tiny_model: TinyModel) -> None:
    """The same tensor, in steps of three tokens and of one."""
    model, spec = tiny_model("llama")
    mask = torch.tensor([[True] * 4, [False] * 3 + [True]])
    cache = paged_cache(spec, sequences=2)
    attention.register()
    layer = cache.paged[0]
    for tokens in (3, 1):
        states = [torch.randn(2, heads, tokens, spec.head_dim) for heads in (4, 2, 2)]
        key, value = layer.update(*states[1:])
        attention.attention_forward(model, states[0], key, value, mask)
    assert [row.length for row in layer.rows] == [3 + 1, 1 + 1]


def test_padding_takes_no_blocks(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    cache = paged_cache(spec, sequences=2)
    ids = PROMPT.repeat(2, 1)
    mask = torch.ones_like(ids)
    mask[1, :15] = 0
    paged(model)(ids, attention_mask=mask, **cache_argument(model, cache))
    assert [row.length for row in cache.paged[0].rows] == [20, 5]
    assert (cache.live_tokens(), cache.kept()) == (25, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_padding_in_a_step_of_one_token_is_not_stored(family: str, tiny_model: TinyModel) -> None:
    """Token by token, while one row's padding still goes on, and at first for all rows."""
    model, spec = tiny_model(family)
    mask = torch.ones(3, 20, dtype=torch.long)
    mask[0, :2], mask[1, :5], mask[2, :19] = 0, 0, 0
    ids = PROMPT.repeat(3, 1) * mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    cache, last = paged_cache(spec, sequences=3), torch.empty(0)
    for at in range(20):
        told = {"attention_mask": mask[:, : at + 1], "position_ids": positions[:, at : at + 1]}
        last = paged(model)(ids[:, at : at + 1], **told, **cache_argument(model, cache)).logits
    assert [row.length for row in cache.paged[0].rows] == [18, 15, 1]
    for row, first in enumerate((2, 5, 19)):
        alone = model(ids[row : row + 1, first:], **cache_argument(model, paged_cache(spec)))
        torch.testing.assert_close(last[row, -1], alone.logits[0, -1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_chunks_of_a_prompt_are_one_pass(family: str, tiny_model: TinyModel) -> None:
    model, spec = tiny_model(family)
    whole = paged(model)(PROMPT, **cache_argument(model, paged_cache(spec))).logits
    cache, parts = paged_cache(spec), []
    for chunk in PROMPT.split([7, 1, 9, 3], dim=1):
        parts.append(model(chunk, **cache_argument(model, cache)).logits)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_all_blocks_come_back_on_reset(family: str, tiny_model: TinyModel) -> None:
    model, spec = tiny_model(family)
    cache = paged_cache(spec, sequences=2)
    first, _ = generate(paged(model), PROMPT.repeat(2, 1), **cache_argument(model, cache))
    assert cache.nbytes() > 0
    assert cache.get_seq_length() == 31
    cache.reset()
    assert cache.nbytes() == cache.get_seq_length() == 0
    cache.pool.check_integrity()
    again, _ = generate(model, PROMPT.repeat(2, 1), **cache_argument(model, cache))
    assert torch.equal(again, first)


def test_nbytes_counts_the_blocks_of_a_sequence(tiny_spec: Callable[..., ModelSpec]) -> None:
    cache = paged_cache(tiny_spec("mistral"))
    cache.open(40)
    # the window of 6 tokens takes a block for each of 2 KV heads in each of 2 layers
    assert cache.nbytes() == 4 * 2 * 16 * 8 * 4


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_other_attention_is_refused(implementation: str, tiny_model: TinyModel) -> None:
    """It would see the new tokens only, and answer wrongly."""
    model, spec = tiny_model("llama")
    model.set_attn_implementation(implementation)
    cache = cache_argument(model, paged_cache(spec))
    with pytest.raises(InputError, match="set_attn_implementation"):
        model(PROMPT, **cache)
    with pytest.raises(InputError, match="set_attn_implementation"):
        model(PROMPT[:, :1], **cache)


def test_ullage_attention_without_a_paged_cache_is_refused(tiny_model: TinyModel) -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(RuntimeError, match="PagedCache"):
        paged(model)(PROMPT)


def test_another_batch_than_the_cache_holds_is_refused(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    cache = paged_cache(spec, sequences=3)
    paged(model)(PROMPT.repeat(2, 1), **cache_argument(model, cache))
    with pytest.raises(RuntimeError, match="3 sequences"):
        model(PROMPT.repeat(3, 1), **cache_argument(model, cache))


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_beam_search_is_transformers_own(family: str, tiny_model: TinyModel) -> None:
    model, spec = tiny_model(family)
    model.set_attn_implementation("eager")
    ids = PROMPT.repeat(2, 1)
    ids[1] += 3
    tokens, _ = generate(model, ids, num_beams=3)
    cache = paged_cache(spec, sequences=6)
    ours, _ = generate(paged(model), ids, num_beams=3, **cache_argument(model, cache))
    assert torch.equal(ours, tokens)
    cache.reset()
    cache.pool.check_integrity(all_free=True)


def test_beams_that_find_no_room_leave_the_rows_as_they_were(
    tiny_spec: Callable[..., ModelSpec],
) -> None:
    cache = paged_cache(tiny_spec("llama"), tokens=32, sequences=2)
    cache.activate([cache.open(32)])
    free, layer = cache.pool.free_blocks, cache.paged[0]
    row = layer.rows[0]
    row.attend(NewTokens(*(torch.zeros(2, 20, 8) for _ in range(3)), scale=1.0), lambda q, _: q)
    for _ in range(2):  # the second copy has to be refused
        with pytest.raises(BudgetExceeded):
            layer.batch_select_indices(torch.zeros(99, dtype=torch.long))
        assert cache.pool.free_blocks == free
        assert layer.rows == [row]


@torch.inference_mode()
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_copied_sequence_goes_its_own_way(family: str, tiny_model: TinyModel) -> None:
    model, spec = tiny_model(family)
    cache = paged_cache(spec, sequences=3)

    def read(ids: torch.Tensor) -> torch.Tensor:
        return paged(model)(ids, **cache_argument(model, cache)).logits[0, -1]

    sequence = cache.open(40)
    cache.activate([sequence])
    read(PROMPT)
    twin = sequence.copy()
    last = {}
    for name, one, token in (("first", sequence, 7), ("twin", twin, 9)):
        cache.activate([one])
        last[name] = read(torch.tensor([[token]]))
    for name, token in (("first", 7), ("twin", 9)):
        fresh = cache.open(40)
        cache.activate([fresh])
        read(PROMPT)
        torch.testing.assert_close(read(torch.tensor([[token]])), last[name])
        fresh.close()
    twin.close()
    sequence.close()
    cache.pool.check_integrity(all_free=True)


def test_a_copy_that_fails_takes_nothing(tiny_spec: Callable[..., ModelSpec]) -> None:
    cache = paged_cache(tiny_spec("gemma2"), tokens=64)
    sequence = cache.open(40)
    free = cache.pool.free_blocks
    with pytest.raises(BudgetExceeded):
        sequence.copy()
    assert cache.pool.free_blocks == free
    sequence.close()
    cache.pool.check_integrity(all_free=True)


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_open_that_fails_takes_nothing(family: str, tiny_spec: Callable[..., ModelSpec]) -> None:
    cache = paged_cache(tiny_spec(family), tokens=64)
    cache.open(30)
    free = cache.pool.free_blocks
    with pytest.raises(BudgetExceeded):
        cache.open(64)
    assert cache.pool.free_blocks == free
    cache.pool.check_integrity()


def test_sequences_take_turns(tiny_model: TinyModel) -> None:
    """Two sequences of different lengths, alone, together and in another order, as an engine
    activates them."""
    model, spec = tiny_model("gemma2")
    alone = [
        paged(model)(ids, **cache_argument(model, paged_cache(spec))).logits[0, -1]
        for ids in (PROMPT, PROMPT[:, 3:13])
    ]
    cache = paged_cache(spec, sequences=2)
    one, other = cache.open(20), cache.open(10)
    for sequence, ids in ((one, PROMPT[:, :-1]), (other, PROMPT[:, 3:12])):
        cache.activate([sequence])
        model(ids, **cache_argument(model, cache))
    cache.activate([other, one])
    positions = torch.tensor([[other.length], [one.length]])
    last = torch.stack([PROMPT[0, 12:13], PROMPT[0, -1:]])
    together = model(last, position_ids=positions, **cache_argument(model, cache)).logits[:, 0]
    torch.testing.assert_close(together, torch.stack(alone[::-1]), atol=1e-4, rtol=1e-4)
    one.close()
    other.close()
    assert cache.nbytes() == 0


@pytest.mark.parametrize(("dtype", "within"), [(torch.bfloat16, 0.02), (torch.int8, 0.04)])
def test_rounded_entries_stay_close_to_fp32(
    dtype: torch.dtype, within: float, tiny_model: TinyModel
) -> None:
    model, spec = tiny_model("qwen3", initializer_range=0.1)
    exact = paged(model)(PROMPT, **cache_argument(model, paged_cache(spec))).logits
    cache = paged_cache(spec, dtype=dtype)
    parts = [
        model(chunk, **cache_argument(model, cache)).logits for chunk in PROMPT.split(6, dim=1)
    ]
    rounded = torch.cat(parts, dim=1)
    assert 0 < (rounded - exact).abs().max() < within * exact.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_generate_over_int8_entries_is_close_to_transformers_own(
    family: str, tiny_model: TinyModel
) -> None:
    model, spec = tiny_model(family)
    model.set_attn_implementation("eager")
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    ids = torch.cat([PROMPT, PROMPT.flip(1)]) * mask
    _, logits = generate(model, ids, attention_mask=mask)
    cache = paged_cache(spec, sequences=2, dtype=torch.int8)
    _, ours = generate(paged(model), ids, attention_mask=mask, **cache_argument(model, cache))
    first = (ours - logits)[:, 0]  # later ones may follow another token
    assert 0 < first.abs().max() < 0.05 * logits.abs().max()
    assert cache.nbytes() == 2 * sequence_bytes(spec, 31, "int8")
    cache.reset()
    cache.pool.check_integrity(all_free=True)


@pytest.mark.filterwarnings("error::FutureWarning")
def test_the_cache_goes_by_the_name_that_transformers_gives_it(tiny_model: TinyModel) -> None:
    model, spec = tiny_model("llama")
    paged(model)(PROMPT, **cache_argument(model, paged_cache(spec)))


def test_a_forward_of_before_the_renaming_gets_the_old_name() -> None:
    class Old:
        def forward(self, input_ids: Any, past_key_values: Any) -> None: ...

    assert cache_argument(Old(), "it") == {"past_key_values": "it"}  # type: ignore[arg-type, comparison-overlap]
