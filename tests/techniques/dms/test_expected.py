"""Expected attention against the mean over queries that are drawn one by one."""

from dataclasses import replace

import pytest
import torch

from ullage.kv.rotation import rotated
from ullage.kv.rows import NewTokens
from ullage.techniques.dms.expected import FUTURE_TOKENS, ExpectedAttention

HEADS, GROUP, DIM, SEEN = 2, 2, 8, 64
SCALE = 0.3


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def angles_at(positions: torch.Tensor, width: int, factor: float = 1.0) -> list[torch.Tensor]:
    turn = 1 / 50 ** (torch.arange(width // 2) / (width // 2))
    angles = torch.cat([positions[:, None] * turn] * 2, dim=1)
    return [factor * angles.cos(), factor * angles.sin()]


def tokens_of(width: int, factor: float = 1.0) -> tuple[NewTokens, torch.Tensor]:
    """Tokens from position 10 on, and their queries before rotation."""
    raw = randn(1, HEADS * GROUP, SEEN, DIM) * 0.3 + randn(2, HEADS * GROUP, 1, DIM)
    keys, values = randn(3, HEADS, SEEN, DIM), randn(4, HEADS, SEEN, DIM)
    cos, sin = angles_at(torch.arange(10.0, 10 + SEEN), width, factor)
    turned = [rotated(states, cos, sin) for states in (raw, keys)]
    return NewTokens(turned[0], turned[1], values, SCALE, cos, sin), raw


@pytest.mark.parametrize("width", [8, 4])
def test_turning_and_turning_back_is_nothing(width: int) -> None:
    states = randn(1, 3, 5, 8)
    cos, sin = angles_at(torch.arange(5.0), width)
    torch.testing.assert_close(rotated(rotated(states, cos, sin), cos, -sin), states)


def order_of(worth: torch.Tensor) -> torch.Tensor:
    """Each entry's place among those of its head."""
    return worth.argsort(-1).argsort(-1)


@pytest.mark.parametrize("width", [8, 4])
@pytest.mark.parametrize("sizes", [[SEEN], [1] * SEEN, [1, 20, 43]], ids=str)
def test_worth_is_what_future_queries_give(width: int, sizes: list[int]) -> None:
    """Each head's order of its keys, by the definition: normal queries, turned by the mean of the
    positions ahead."""
    new, raw = tokens_of(width)
    scorer, at = ExpectedAttention(), 0
    for size in sizes:
        scorer.see(new.part(at, at + size))
        at += size
    order = order_of(scorer.scores(new.keys, new.values))
    ahead = torch.arange(10.0 + SEEN, 10 + SEEN + FUTURE_TOKENS)
    cos, sin = (part.mean(0, keepdim=True) for part in angles_at(ahead, width))
    for head in range(HEADS):
        worth = torch.zeros(SEEN)
        for query in range(head * GROUP, (head + 1) * GROUP):
            mean, variance = raw[query].mean(0), raw[query].var(0, correction=0)
            key = rotated(new.keys[head][None], cos, -sin)[0] * SCALE
            expected = key @ mean + (key**2 * variance).sum(-1) / 2
            worth += expected.softmax(0)
        assert order[head].tolist() == order_of(worth).tolist()


def test_a_factor_on_rotated_states_changes_no_order() -> None:
    """As of models whose context was lengthened by YaRN: queries and keys are longer by it."""
    (plain, _), (longer, _) = tokens_of(DIM), tokens_of(DIM, 1.3)
    orders = []
    for new, scale in ((plain, SCALE), (longer, SCALE / 1.3**2)):
        scorer = ExpectedAttention()
        scorer.see(NewTokens(new.query, new.keys, new.values, scale, new.cos, new.sin))
        orders.append(order_of(scorer.scores(new.keys, new.values)))
    assert torch.equal(*orders)


def test_a_chunks_last_token_does_not_keep_the_chunk() -> None:
    new, _ = tokens_of(DIM)
    scorer = ExpectedAttention()
    scorer.see(new.part(0, SEEN - 1))
    scorer.see(new.part(SEEN - 1, SEEN))
    for part in scorer._waiting[0]:
        assert part is not None
        assert part.untyped_storage().nbytes() == part.nbytes


def test_without_rotation_keys_are_taken_as_they_are() -> None:
    query, keys = randn(1, HEADS * GROUP, SEEN, DIM), randn(2, HEADS, SEEN, DIM)
    scorer = ExpectedAttention()
    scorer.see(NewTokens(query, keys, keys, SCALE))
    order = order_of(scorer.scores(keys, keys))
    mean, variance = query.mean(1), query.var(1, correction=0)
    key = keys[0] * SCALE
    worth = sum(
        (key @ mean[at] + (key**2 * variance[at]).sum(-1) / 2).softmax(0) for at in range(GROUP)
    )
    assert order[0].tolist() == order_of(torch.as_tensor(worth)).tolist()


def test_queries_that_lose_their_rotation_are_refused() -> None:
    """As when a cache goes on after DMS was detached."""
    new, _ = tokens_of(DIM)
    scorer = ExpectedAttention()
    scorer.see(new)
    with pytest.raises(RuntimeError, match="not attached any more"):
        scorer.see(replace(new, cos=None, sin=None))
