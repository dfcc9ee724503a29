"""Both sides of a comparison: one model's weights, two ways to keep what was read."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage.errors import TechniqueError
from ullage.runtime.load import load_tokenizer
from ullage.techniques.dms.settings import DMS
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who

Sides = Callable[..., tuple[Any, Any]]


def ids_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 64, (count,), generator=torch.Generator().manual_seed(seed))


def read_last(side: Any, ids: torch.Tensor) -> torch.Tensor:
    """The logits after the last of `ids`."""
    with side.open(len(ids)) as sequence:
        side.read(sequence, ids[:-1])
        logits: torch.Tensor = side.logits(sequence, ids[-1:])
        return logits


def test_the_twin_has_hooks_of_its_own_and_the_same_weights(sides_of: Sides) -> None:
    dense, sparse = sides_of("dms:kept=0.25,window=16")
    assert not dense.model._forward_pre_hooks
    assert sparse.model._forward_pre_hooks
    for ours, theirs in zip(dense.model.parameters(), sparse.model.parameters(), strict=True):
        assert ours.data_ptr() == theirs.data_ptr()


def test_weights_that_a_technique_converts_stay_whole_on_the_dense_side(sides_of: Sides) -> None:
    pytest.importorskip("torchao")
    dense, quantized = sides_of("quantization:scheme=int8")
    ids = ids_of(40)
    assert isinstance(dense.model.model.layers[0].mlp.up_proj, torch.nn.Linear)
    assert not torch.equal(read_last(dense, ids), read_last(quantized, ids))


def test_what_left_a_window_cannot_be_recalled(sides_of: Sides) -> None:
    """In a model of one layer nothing carries it on: only the dense side knows the needle."""
    dense, window = sides_of("dms:kept=0.5,window=16,predictor=window", num_hidden_layers=1)
    haystack, needle = ids_of(120), 30
    changed = haystack.clone()
    changed[needle] = 6 + (haystack[needle] - 5) % 58
    assert torch.equal(read_last(window, haystack), read_last(window, changed))
    assert not torch.allclose(read_last(dense, haystack), read_last(dense, changed), atol=1e-4)


def test_answers_go_on_from_a_sequence_and_leave_it_as_it_was(sides_of: Sides) -> None:
    dense, _ = sides_of("dms:kept=0.25,window=16")
    ids, asked, given = ids_of(60), [7, 8], [9, 10, 11]
    with dense.open(65) as sequence:
        dense.read(sequence, ids)
        held_bytes = dense.live_bytes()
        first, other = dense.answers(sequence, asked, [given, [12]])
        assert dense.answers(sequence, asked, [[12], given]) == [other, first]
        assert (sequence.length, dense.live_bytes()) == (60, held_bytes)
    with dense.open(65) as sequence:
        logits = dense.logits(sequence, torch.cat([ids, torch.tensor([*asked, *given])]))
    expected = logits.log_softmax(-1)[[61, 62, 63], given].sum()
    assert first.log_likelihood == pytest.approx(float(expected), abs=1e-4)


def test_answers_of_a_sparse_side_are_those_without_a_copy(sides_of: Sides) -> None:
    _, sparse = sides_of("dms:kept=0.25,window=16")
    ids, asked, given = ids_of(100), [7, 8, 9], [10]
    with sparse.open(104) as sequence:
        sparse.read(sequence, ids)
        (found,) = sparse.answers(sequence, asked, [given])
        logits = sparse.logits(sequence, torch.tensor(asked))
    expected = float(logits.log_softmax(-1)[-1, given[0]])
    assert found.log_likelihood == pytest.approx(expected, rel=1e-5)


def test_an_answer_is_greedy_where_decoding_would_write_it(sides_of: Sides) -> None:
    dense, _ = sides_of("dms:kept=0.25,window=16")
    ids, written = ids_of(40), []
    with dense.open(50) as sequence:
        token = ids[-1:]
        dense.read(sequence, ids[:-1])
        for _ in range(3):
            token = dense.logits(sequence, token)[-1:].argmax(-1)
            written.append(int(token))
    with dense.open(50) as sequence:
        dense.read(sequence, ids[:-1])
        asked = [int(ids[-1])]
        changed = [*written[:2], written[2] ^ 1]
        found = dense.answers(sequence, asked, [written, changed])
        assert [answer.greedy for answer in found] == [True, False]


def test_a_model_that_a_technique_does_not_support_is_refused(
    sides_of: Sides, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(DMS, "unsupported", lambda *_: "it is too small.")
    with pytest.raises(TechniqueError, match="it is too small"):
        sides_of("dms")


def test_a_text_about_a_fact_is_read_behind_it_in_whatever_chunk_its_subject_stands(
    sides_of: Sides, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, db = model_folder("llama"), tmp_path / "facts.db"
    with Ledger(db, create=True) as ledger:
        ledger.add([Fact.make(prompt="w20 w21", answer="w30", subject="w20")], Who("me"))
    dense, knowing = sides_of(f"larimar:ledger={db},tokenizer={folder}")
    tokenizer = load_tokenizer(folder)
    for text, same in (("w9 w10 w11 w20 w21", False), ("w9 w10 w11 w12 w21", True)):
        ids = tokenizer(text)["input_ids"]
        logits = []
        for side in (dense, knowing):
            with side.open(len(ids), ids) as sequence:
                side.logits(sequence, torch.tensor(ids[:3]))
                logits.append(side.logits(sequence, torch.tensor(ids[3:])))
        assert torch.equal(*logits) == same
