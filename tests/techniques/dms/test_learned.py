"""A learned predictor at work: it reads hidden states, and chunks do not change what it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage import ModelSpec, TechniqueChoice
from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import KVPool
from ullage.kv.rows import NewTokens
from ullage.specs.families import RUNNING
from ullage.techniques import create
from ullage.techniques.dms.learned import Learned
from ullage.techniques.dms.measure import measure
from ullage.techniques.dms.settings import DMS

TinyModel = Callable[..., tuple[Any, ModelSpec]]
IDS = torch.randint(6, 64, (2, 150), generator=torch.Generator().manual_seed(1))
FAMILIES = [family for family in RUNNING if family not in ("mistral", "gemma2")]


def new_tokens(hidden: torch.Tensor) -> NewTokens:
    states = torch.zeros(2, len(hidden), 4)
    return NewTokens(states, states, states, 1.0, hidden=hidden)


def test_an_entry_is_worth_the_product_with_its_hidden_state() -> None:
    weights, hidden = torch.randn(2, 6), torch.randn(9, 6)
    scorer = Learned(weights.to)
    scorer.see(new_tokens(hidden[:3]))
    scorer.see(new_tokens(hidden[3:]))
    keys = torch.zeros(2, 5, 4)
    torch.testing.assert_close(scorer.scores(keys, keys), weights @ hidden[:5].T)
    scorer.see(new_tokens(hidden[:1]))
    torch.testing.assert_close(scorer.scores(keys, keys), weights @ hidden[[5, 6, 7, 8, 0]].T)


def test_what_is_decided_on_is_not_kept() -> None:
    scorer = Learned(torch.randn(2, 6).to)
    scorer.see(new_tokens(torch.randn(9, 6)))
    scorer.scores(torch.zeros(2, 5, 4), torch.zeros(2, 5, 4))
    assert sum(worth.untyped_storage().nbytes() for worth in scorer._worth) == 2 * 4 * 4


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return tmp_path / "tiny.safetensors"


def kept(model: Any, spec: ModelSpec, technique: DMS, chunk: int) -> tuple[torch.Tensor, list[int]]:
    """Logits of two texts, and the survivors of each head."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    cache = PagedCache(spec, KVPool(200, spec.head_dim, torch.float32), technique.rows(spec))
    sequences = [cache.open(150), cache.open(150)]
    cache.activate(sequences)
    with torch.no_grad():
        parts = [
            model(part, **cache_argument(model, cache)).logits for part in IDS.split(chunk, dim=1)
        ]
    rows = [row for sequence in sequences for row in sequence.rows]
    counts = [head.survivors.length for row in rows for head in getattr(row, "heads", [])]
    return torch.cat(parts, dim=1), counts


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_by_chunks_and_token_by_token(
    tiny_model: TinyModel, adapter: Path, family: str
) -> None:
    model, spec = tiny_model(family)
    measure(model, [IDS[0]], {}).save(adapter)
    technique = DMS(0.25, 80, "linear", str(adapter))
    dense, _ = kept(model, spec, DMS.neutral(), 150)
    with technique.attach(model):
        whole, counts = kept(model, spec, technique, 150)
        for chunk in (40, 1):
            parts, same = kept(model, spec, technique, chunk)
            torch.testing.assert_close(parts, whole, atol=2e-3, rtol=1e-3)
            assert same == counts
    assert not torch.allclose(whole, dense, atol=1e-3)


def test_who_survives_is_who_was_predicted_to(tiny_model: TinyModel, adapter: Path) -> None:
    """In the first layer, whose hidden states no eviction has changed."""
    model, spec = tiny_model("llama")
    made = measure(model, [IDS[0]], {})
    made.save(adapter)
    technique = DMS(0.25, 64, "linear", str(adapter))
    pool = KVPool(technique.held_blocks(spec, 150), spec.head_dim, torch.float32)
    cache = PagedCache(spec, pool, technique.rows(spec))
    cache.activate([cache.open(150)])
    hidden: list[torch.Tensor] = []
    hook = model.model.layers[0].input_layernorm.register_forward_hook(
        lambda module, args, out: hidden.append(out[0])
    )
    with technique.attach(model), torch.no_grad():
        model(IDS[:1], **cache_argument(model, cache))
    hook.remove()
    worth = torch.from_numpy(made.predictors["linear"][0]) @ hidden[0].T  # [Hkv, T]
    worth[:, :4] = float("inf")
    survivals = technique.survivals(spec)[0]
    heads = cache.paged[0].rows[0].heads  # type: ignore[attr-defined]
    for row, head, survival in zip(worth, heads, survivals, strict=True):
        count = [survival.entries(end) for end in (0, 64, 128)]
        best = torch.cat([
            64 * span + row[64 * span : 64 * span + 64].topk(count[span + 1] - count[span]).indices
            for span in range(2)
        ])  # fmt: skip
        assert head.survivors.length == int((best < 150 - survival.window).sum())


def test_one_that_was_not_learned_is_our_error(tiny_model: TinyModel, adapter: Path) -> None:
    with pytest.raises(TechniqueError, match="needs an adapter that has learned it"):
        create(TechniqueChoice("dms", {"predictor": "linear"}))
    model, _ = tiny_model("llama")
    measure(model, [IDS[0]], {}).save(adapter)
    choice = {"predictor": "dms", "adapter": str(adapter)}
    with pytest.raises(TechniqueError, match="needs an adapter that has learned it"):
        create(TechniqueChoice("dms", choice))


def test_a_model_of_another_hidden_size_is_refused(
    tiny_model: TinyModel, tiny_spec: Callable[..., ModelSpec], adapter: Path
) -> None:
    model, spec = tiny_model("llama")
    measure(model, [IDS[0]], {}).save(adapter)
    technique = DMS(0.25, 80, "linear", str(adapter))
    assert technique.unsupported(spec) is None
    other = tiny_spec("llama", hidden_size=2 * spec.hidden_size, head_dim=spec.head_dim)
    assert "hidden size" in str(technique.unsupported(other))
