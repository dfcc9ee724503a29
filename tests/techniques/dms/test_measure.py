"""How far back heads look, held to attention written out, and an adapter at work in a model."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage import ModelSpec
from ullage.errors import TechniqueError
from ullage.kv.attach import rows_in
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks, KVPool
from ullage.kv.sparse import SparseRow
from ullage.specs.families import RUNNING
from ullage.specs.survivors import SINKS
from ullage.techniques.dms.measure import measure
from ullage.techniques.dms.rows import row_maker
from ullage.techniques.dms.settings import DMS

TinyModel = Callable[..., tuple[Any, ModelSpec]]
LONG = torch.randint(6, 64, (2000,), generator=torch.Generator().manual_seed(2))
IDS = torch.randint(6, 64, (200,), generator=torch.Generator().manual_seed(1))
MEASURED = [family for family in RUNNING if family not in ("mistral", "gemma2")]


@torch.inference_mode()
def hidden(model: Any, ids: torch.Tensor, cache: PagedCache | None = None) -> list[torch.Tensor]:
    """The residual stream before each layer, and the last one's output behind the norm."""
    more = {} if cache is None else cache_argument(model, cache)
    out = model(ids[None], output_hidden_states=True, **more)
    return [states[0] for states in out.hidden_states]


def cut(model: Any, spec: ModelSpec, layer: int, head: int, window: int) -> torch.Tensor:
    """Log-probabilities after each token, [T, V], where one head sees `window` tokens."""
    alike = DMS(0.5, 4096, "window")
    survivals = dict(alike.survivals(spec))
    changed = list(survivals[layer])
    changed[head] = replace(changed[head], window=window)
    rows = {number: row_maker(alike, of) for number, of in survivals.items()}
    rows[layer] = row_maker(alike, changed)
    pool = HeapBlocks(spec.head_dim, torch.float32, "cpu")
    with rows_in(model, rows, SparseRow, "DMS"), torch.no_grad():
        cache = PagedCache(spec, pool, rows)
        return model(LONG[None], **cache_argument(model, cache)).logits[0].log_softmax(-1)


def test_losses_are_those_of_cutting_a_head(tiny_model: TinyModel) -> None:
    """The KL divergence that it really makes, to second order and by sampling: within a half."""
    model, spec = tiny_model("llama", initializer_range=0.1)
    adapter = measure(model, [LONG], {})
    whole = cut(model, spec, 0, 0, 4096)
    for layer, head in ((0, 0), (0, 1), (1, 0), (1, 1)):
        changed = cut(model, spec, layer, head, 64)
        divergence = (whole.exp() * (whole - changed)).sum(-1)[len(LONG) // 2 :].mean()
        assert float(adapter.loss[layer, head, 0]) == pytest.approx(float(divergence), rel=0.5)


@pytest.mark.parametrize("family", MEASURED)
def test_every_family_is_measured_as_it_is_and_stays_so(tiny_model: TinyModel, family: str) -> None:
    model, spec = tiny_model(family)
    model.set_attn_implementation("eager")
    before, seen = hidden(model, IDS), []
    hook = model.base_model.register_forward_hook(
        lambda module, args, out: seen.append(out.last_hidden_state[0].detach())
    )
    adapter = measure(model, [IDS], {"why": "test"})
    hook.remove()
    torch.testing.assert_close(seen[0], before[-1], atol=1e-4, rtol=1e-4)
    assert adapter.unsuited(spec) is None
    assert adapter.loss.min() >= 0
    assert adapter.loss.max() > 0
    for one, other in zip(before, hidden(model, IDS), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_caps_its_scores_is_our_error(tiny_model: TinyModel) -> None:
    model, _ = tiny_model("gemma2")
    with pytest.raises(TechniqueError, match="caps its attention scores"):
        measure(model, [IDS], {})
    assert not model.training


def test_a_text_that_is_short_is_our_error(tiny_model: TinyModel) -> None:
    model, _ = tiny_model("llama")
    with pytest.raises(TechniqueError, match="nothing to measure in 50 tokens"):
        measure(model, [IDS[:50]], {})
    with pytest.raises(TechniqueError, match="no text"):
        measure(model, [], {})


def test_heads_hold_what_the_adapter_says(tiny_model: TinyModel, tmp_path: Path) -> None:
    """Planned blocks are those taken, and a model of other weights is refused."""
    model, spec = tiny_model("llama")
    path = tmp_path / "tiny.safetensors"
    measure(model, [IDS], {}).save(path)
    technique = DMS(0.5, 80, "window", str(path))
    windows = [
        survival.window for layer in technique.survivals(spec).values() for survival in layer
    ]
    assert len(set(windows)) > 1
    assert sum(windows) <= 80 * len(windows)
    pool = KVPool(technique.held_blocks(spec, 200), spec.head_dim, torch.float32)
    cache = PagedCache(spec, pool, technique.rows(spec))
    sequence = cache.open(200)
    assert pool.free_blocks == 0
    cache.activate([sequence])
    with technique.attach(model):
        hidden(model, IDS, cache)
    held = [head.ring.used + head.survivors.length for row in sequence.rows for head in row.heads]  # type: ignore[attr-defined]
    assert held == [min(window, 200) + SINKS for window in windows]
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    with pytest.raises(TechniqueError, match="other weights"), technique.attach(model):
        pass
