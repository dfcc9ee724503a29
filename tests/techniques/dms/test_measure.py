"""How far back heads look, held to attention written out, and an adapter at work in a model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage import ModelSpec
from ullage.errors import TechniqueError
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import KVPool
from ullage.specs.families import RUNNING
from ullage.techniques.dms.measure import EVERY_TOKENS, measure
from ullage.techniques.dms.settings import DMS, SINKS

TinyModel = Callable[..., tuple[Any, ModelSpec]]
IDS = torch.randint(6, 64, (200,), generator=torch.Generator().manual_seed(1))
FAMILIES = [family for family in RUNNING if family != "mistral"]  # each of its layers slides


@torch.inference_mode()
def hidden(model: Any, ids: torch.Tensor, cache: PagedCache | None = None) -> list[torch.Tensor]:
    """The residual stream before each layer, and the last one's output behind the norm."""
    more = {} if cache is None else cache_argument(model, cache)
    out = model(ids[None], output_hidden_states=True, **more)
    return [states[0] for states in out.hidden_states]


def test_what_a_window_loses_in_the_first_layer(tiny_model: TinyModel) -> None:
    """A window for all heads, in the model itself: the change of the attention output is that of
    the heads together, so at most as long as theirs one after the other."""
    model, spec = tiny_model("llama")
    adapter = measure(model, [IDS], {})
    at = torch.arange(100, 200, EVERY_TOKENS)
    residual = hidden(model, IDS)[0][at]
    outputs: list[torch.Tensor] = []
    hook = model.model.layers[0].self_attn.register_forward_hook(
        lambda module, args, out: outputs.append(out[0][0])
    )
    for technique in (DMS(0.5, 64, "window"), DMS(0.5, 4096, "window")):
        pool = KVPool(200, spec.head_dim, torch.float32)
        with technique.attach(model):
            hidden(model, IDS, PagedCache(spec, pool, technique.rows(spec)))
    hook.remove()
    lost = (outputs[0] - outputs[1])[at].norm(dim=-1) / residual.norm(dim=-1)
    by_head = torch.as_tensor(adapter.loss[0, :, adapter.windows.index(64)]).sqrt()
    assert 0 < lost.square().mean().sqrt() <= by_head.sum() * (1 + 1e-4)
    assert lost.square().mean().sqrt() >= (by_head.max() - by_head.min()) * (1 - 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_measured_and_stays_as_it_is(
    tiny_model: TinyModel, family: str
) -> None:
    model, spec = tiny_model(family)
    before = hidden(model, IDS)
    adapter = measure(model, [IDS, IDS.flip(0)], {"why": "test"})
    assert adapter.unsuited(spec) is None
    assert (adapter.loss >= 0).all()
    assert adapter.loss.max() > 0
    for one, other in zip(before, hidden(model, IDS), strict=True):
        assert torch.equal(one, other)


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
