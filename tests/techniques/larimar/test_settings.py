"""What facts take, as it is planned."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy
import pytest

from ullage.planner.engines.forward import layer_term
from ullage.specs.footprint import Footprint
from ullage.specs.model import ModelSpec
from ullage.specs.workload import Execution, Step
from ullage.techniques.larimar.adapter import Adapter
from ullage.techniques.larimar.ledger import Ledger
from ullage.techniques.larimar.settings import MOST_ENTRIES, MOST_TOKENS, READ_TOKENS, Larimar

BEFORE = Footprint(10, 20, 30, 40, 50)


@pytest.fixture
def facts(path: Path) -> str:
    with Ledger(path, create=True):
        return str(path)


def test_facts_are_beside_the_entries_of_sequences(
    tiny_spec: Callable[..., ModelSpec], facts: str
) -> None:
    """Held and seen by each of two sequences; as scratch those being made, and the text that they
    are made of, twice; K and V of 2 layers, 2 heads, 8 numbers of 4 bytes."""
    spec, execution = tiny_spec("llama"), Execution(dtype="fp32", kv_dtype="int8")
    step = Step("decode", 2, 100, 2, execution)
    after = Larimar(facts, held=3).footprint(BEFORE, spec, step)
    entry_bytes = 2 * 2 * 2 * 8 * 4
    kv_bytes = 3 * 2**20 + 2 * MOST_ENTRIES * entry_bytes
    made_bytes = (MOST_ENTRIES + 2 * MOST_TOKENS) * entry_bytes
    assert after == Footprint(10, 20 + kv_bytes, 30 + made_bytes, 40, 50)
    loading = Step("load", 2, 0, 0, execution)
    assert Larimar(facts).footprint(BEFORE, spec, loading) == BEFORE


def test_an_adapter_is_planned_in_fp32_with_what_it_computes(
    tiny_spec: Callable[..., ModelSpec], facts: str, tmp_path: Path
) -> None:
    """Beside what is planned without: K and V of 2 layers, 2 heads, 8 numbers of 4 bytes, as mean
    and three rows, a scale a layer, which are weights, and of as many entries as a fact has, four
    times, which is scratch."""
    file = tmp_path / "made.safetensors"
    mean, basis = numpy.ones((2, 2, 2, 8)), numpy.ones((3, 2, 2, 2, 8))
    Adapter(mean, numpy.ones((2, 2)), basis, "of nobody", {}).save(file)
    spec, latent = tiny_spec("llama"), Larimar(facts, "latent", str(file))
    adapter_bytes = (1 + 3) * 64 * 4 + 4 * 4
    for dtype in ("fp32", "bf16"):
        step = Step("decode", 2, 100, 2, Execution(dtype=dtype, kv_dtype="int8"))
        plain = Larimar(facts).footprint(BEFORE, spec, step)
        assert latent.footprint(BEFORE, spec, step) == replace(
            plain,
            weights_bytes=10 + adapter_bytes,
            activation_bytes=plain.activation_bytes + 4 * MOST_ENTRIES * 64 * 4,
        )
    loading = Step("load", 2, 0, 0, Execution(dtype="fp32", kv_dtype="fp32"))
    with_it = replace(BEFORE, weights_bytes=10 + adapter_bytes)
    assert latent.footprint(BEFORE, spec, loading) == with_it


@pytest.mark.parametrize("tokens", [1, 10, READ_TOKENS, 100])
def test_a_fact_is_made_in_what_a_prompt_takes(
    tiny_spec: Callable[..., ModelSpec], facts: str, tokens: int
) -> None:
    """Of as many tokens as go through the model at once; what is larger takes no more for it."""
    spec, execution = tiny_spec("llama"), Execution(dtype="fp32", kv_dtype="fp32")

    step = Step("prefill", 1, 100, tokens, execution)
    before = Footprint(activation_bytes=layer_term(spec, step).nbytes)
    planned = Larimar(facts).footprint(before, spec, step)
    beside = Larimar(facts).footprint(Footprint(), spec, replace(step, phase="decode"))
    larger = Step("prefill", 1, 100, max(tokens, READ_TOKENS), execution)
    passed_bytes = layer_term(spec, larger).nbytes
    assert planned.activation_bytes == beside.activation_bytes + passed_bytes


@pytest.mark.parametrize(
    ("family", "says"), [("gpt2", "not rotary"), ("mistral", None), ("gemma3_text", None)]
)
def test_what_it_cannot_act_on(
    tiny_spec: Callable[..., ModelSpec], facts: str, family: str, says: str | None
) -> None:
    reason = Larimar(facts).unsupported(tiny_spec(family))
    assert (reason is None) if says is None else (reason is not None and says in reason)
