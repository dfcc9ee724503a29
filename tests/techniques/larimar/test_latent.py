"""Latents of facts: what is kept of them, and that they are read as entries are."""

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from ullage.errors import TechniqueError
from ullage.kv.fingerprint import fingerprint
from ullage.kv.preface import Preface
from ullage.kv.rotation import turns_of
from ullage.specs.footprint import Footprint
from ullage.specs.workload import Execution, Step
from ullage.techniques.dms.settings import DMS
from ullage.techniques.larimar.adapter import Adapter
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.facts import FactMemory
from ullage.techniques.larimar.latent import Basis, Latent, Latents, at_the_end, unplaced
from ullage.techniques.larimar.readout import KV
from ullage.techniques.larimar.settings import MOST_ENTRIES, Larimar

FACT = {"prompt": "w20 w21", "answer": "w30 w31", "subject": "w20"}
LONG = {"prompt": "w40 w21", "answer": " ".join(["w32", "w33", "w34"] * 8), "subject": "w40"}
UNANSWERED = {"text": "w50 w51 w52", "subject": "w50"}
ABOUT, ABOUT_LONG = "w9 w20 w21", "w9 w40 w21"
OTHER = "w9 w10 w11"
TURNED_APART = {"gemma3_text": {"rope_parameters": {
    "full_attention": {"rope_type": "default", "rope_theta": 500.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10.0},
}}}  # fmt: skip


def adapter_of(model: Any, rank: int | None = None) -> Adapter:
    """One whose basis is random and orthonormal, of full rank or less; its centre is not 0."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or 32 // config.num_attention_heads
    shape = (2, config.num_hidden_layers, config.num_key_value_heads, head_dim)
    random = torch.Generator().manual_seed(1)
    width = int(numpy.prod(shape))
    rows = torch.linalg.qr(torch.randn(width, width, generator=random)).Q[:rank]
    mean, scale = torch.randn(shape, generator=random), 1 + torch.rand(shape[:2], generator=random)
    return Basis(mean, scale, rows).adapter(fingerprint(model), {})


@pytest.fixture
def memory(model: Any, tokenizer: Any) -> Iterator[FactMemory]:
    """One that keeps latents of eight numbers."""
    with FactMemory(model, tokenizer, adapter=adapter_of(model, 8)) as memory:
        yield memory


def says(model: Any, tokenizer: Any, *prompts: str) -> torch.Tensor:
    """Logits of a batch, [B, N, V]."""
    logits: torch.Tensor = model(torch.tensor(tokenizer(list(prompts))["input_ids"])).logits
    return logits


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", "float32"), ("mistral", "float32"), ("qwen3", "float32"), ("phi", "float32"),
     ("gemma3_text", "float32"), ("llama", "bfloat16")],
)  # fmt: skip
def test_a_basis_of_full_rank_reads_a_fact_as_its_entries(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    dtype: str,
) -> None:
    """One whose entries stand next to each other before the prompt: with no words before it."""
    monkeypatch.setattr("ullage.techniques.larimar.readout.LEADS", ())
    changes = TURNED_APART.get(family, {})
    model = tiny_model(family, **changes)[0].to(getattr(torch, dtype))
    before = says(model, tokenizer, ABOUT)
    with FactMemory(model, tokenizer) as memory:
        memory.write(**FACT)
        whole = says(model, tokenizer, ABOUT)
    with FactMemory(model, tokenizer, adapter=adapter_of(model)) as memory:
        memory.write(**FACT)
        latent = says(model, tokenizer, ABOUT)
    tolerance = 2e-2 if dtype == "float32" else 0.3  # latents are fp16
    torch.testing.assert_close(latent, whole, atol=tolerance, rtol=tolerance)
    assert not torch.allclose(whole, before, atol=10 * tolerance)


@pytest.mark.parametrize("family", ["llama", "phi", "gemma3_text"])
def test_keys_are_turned_back_and_forth(
    tiny_model: Callable[..., Any], tokenizer: Any, family: str
) -> None:
    """Every layer's by its own angles, wherever they stand."""
    model = tiny_model(family, **TURNED_APART.get(family, {}))[0]
    readout, fact = KV(model, tokenizer), Fact.make(**FACT)
    entries, preface, turns = unplaced(readout, fact)
    text = readout.text(fact)
    assert len(entries) == len(text.places) < len(text.ids) == len(turns[0][0])
    at = [(cos[text.places], sin[text.places]) for cos, sin in turns]
    for (keys, values), piece in zip(at_the_end(entries, at), preface.pieces, strict=True):
        torch.testing.assert_close(keys, piece.keys, atol=1e-5, rtol=1e-5)
        assert torch.equal(values, piece.values)
    twice = at_the_end(torch.stack([entries, 2 * entries]), turns)  # a batch
    for (keys, values), (own, other) in zip(twice, at_the_end(entries, turns), strict=True):
        torch.testing.assert_close(keys, torch.stack([own, 2 * own]))
        torch.testing.assert_close(values, torch.stack([other, 2 * other]))
    different = not torch.equal(turns[0][0], turns[1][0])
    assert different == (family == "gemma3_text")
    with turns_of(model) as seen:
        pass
    says(model, tokenizer, OTHER)
    assert not seen  # no hook is left


def test_a_text_that_stands_elsewhere_has_the_same_entries(model: Any, tokenizer: Any) -> None:
    """But for what is before it, which the first layer does not see."""
    facts = [Fact.make(**FACT), Fact.make(**{**FACT, "prompt": "w20 w21 w22"})]
    one, other = (unplaced(KV(model, tokenizer), fact)[0] for fact in facts)
    torch.testing.assert_close(one[-1, :, 0], other[-1, :, 0], atol=1e-5, rtol=1e-5)


def test_latents_take_few_bytes(memory: FactMemory) -> None:
    memory.write(**FACT)
    kept = memory._held.hold(Fact.make(**FACT))
    assert isinstance(kept, Latents)
    assert kept.numbers.shape == (len(kept.bias), 8)
    assert memory.nbytes == kept.nbytes == len(kept.bias) * (8 * 2 + 4)
    assert kept.nbytes == sum(part.untyped_storage().nbytes() for part in (kept.numbers, kept.bias))
    read = memory.entries(1)
    assert len(read) == len(kept.bias)
    assert read.written_bias < 1
    assert read.said is not None


def test_a_fact_is_read_by_prompts_about_it_alone(model: Any, tokenizer: Any) -> None:
    about, other = says(model, tokenizer, ABOUT), says(model, tokenizer, OTHER)
    with FactMemory(model, tokenizer, adapter=adapter_of(model, 8)) as memory:
        memory.write(**FACT)
        assert not torch.allclose(says(model, tokenizer, ABOUT), about, atol=1e-2)
        assert torch.equal(says(model, tokenizer, OTHER), other)
    assert torch.equal(says(model, tokenizer, ABOUT), about)


def test_what_is_edited_or_forgotten_was_never_there(
    model: Any, tokenizer: Any, memory: FactMemory
) -> None:
    """Not even in what is known of positions, of which the longest text tells the most."""
    about = says(model, tokenizer, ABOUT_LONG)
    long = memory.write(**LONG)
    assert not torch.equal(says(model, tokenizer, ABOUT_LONG), about)
    number = memory.write(**FACT)
    memory.edit(number, answer="w33")
    held_bytes = memory.nbytes
    memory.forget(long)
    assert 0 < memory.nbytes < held_bytes
    assert torch.equal(says(model, tokenizer, ABOUT_LONG), about)
    after, held_bytes = says(model, tokenizer, ABOUT), memory.nbytes
    memory._attached.close()
    with FactMemory(model, tokenizer, adapter=adapter_of(model, 8)) as fresh:
        fresh.write(**{**FACT, "answer": "w33"})
        assert torch.equal(says(model, tokenizer, ABOUT), after)
        assert fresh.nbytes == held_bytes
    memory.forget(number)
    assert memory.nbytes == 0


def test_a_fact_without_an_answer_is_kept_whole(
    model: Any, tokenizer: Any, memory: FactMemory
) -> None:
    memory.write(**UNANSWERED)
    assert isinstance(memory._held.hold(Fact.make(**UNANSWERED)), Preface)
    latent = says(model, tokenizer, "w9 w50 w51")
    memory._attached.close()
    with FactMemory(model, tokenizer) as whole:
        whole.write(**UNANSWERED)
        assert torch.equal(says(model, tokenizer, "w9 w50 w51"), latent)


def test_it_goes_with_dms(model: Any, tokenizer: Any, memory: FactMemory) -> None:
    memory.write(**FACT)
    dense = says(model, tokenizer, ABOUT)
    with DMS(kept=0.25, window=4).attach(model):
        sparse = says(model, tokenizer, ABOUT)
    torch.testing.assert_close(sparse, dense, atol=1e-4, rtol=1e-4)  # in the window yet


def test_an_adapter_of_other_weights_is_refused(model: Any, tokenizer: Any, path: Path) -> None:
    """Before a ledger is begun."""
    other = replace(adapter_of(model), fingerprint="of nobody")
    with pytest.raises(TechniqueError, match="other weights than this model's"):
        FactMemory(model, tokenizer, path, adapter=other)
    assert not path.exists()


def test_hooks_are_gone_after_an_interrupt(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    readout = Latent(model, tokenizer, adapter_of(model))
    monkeypatch.setattr(model.model.layers[1].mlp, "forward", interrupted)
    with suppress(KeyboardInterrupt):
        readout.make(Fact.make(**FACT))
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_made_and_read_is_planned(
    tiny_model: Callable[..., Any],
    tokenizer: Any,
    peak_of: Callable[..., int],
    tmp_path: Path,
    dtype: str,
) -> None:
    """Of a fact of as many entries as are kept."""
    model, spec = tiny_model("llama")
    model.to(getattr(torch, dtype))
    adapter, file = adapter_of(model, 8), tmp_path / "made.safetensors"
    adapter.save(file)
    (tmp_path / "facts.db").touch()
    readout = Latent(model, tokenizer, adapter)
    words = " ".join(f"w{6 + at % 10}" for at in range(MOST_ENTRIES - 1))
    fact = Fact.make(prompt="w40 w21", answer=words, subject="w40")
    technique = Larimar(str(tmp_path / "facts.db"), "latent", str(file), held=1)
    execution = Execution(dtype={"float32": "fp32", "bfloat16": "bf16"}[dtype], kv_dtype="fp32")
    planned = technique.footprint(Footprint(), spec, Step("decode", 1, 100, 1, execution))
    beside_bytes = planned.kv_bytes - (1 << 20) + planned.activation_bytes
    kept = readout.make(fact)
    assert isinstance(kept, Latents)
    assert len(kept.bias) == MOST_ENTRIES
    assert peak_of(lambda: readout.make(fact)) <= beside_bytes
    assert peak_of(lambda: readout.read(kept)) <= beside_bytes
