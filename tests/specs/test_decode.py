"""JSON data is held to the types of the fields that it goes into."""

from dataclasses import dataclass
from typing import Any, Literal

import pytest

from ullage.errors import InputError
from ullage.specs.decode import decode


@dataclass(frozen=True)
class Leaf:
    count: int
    share: float | None


@dataclass(frozen=True)
class Tree:
    kind: Literal["oak", "fir"]
    name: str
    evergreen: bool
    leaves: tuple[Leaf, ...]
    counts: dict[str, int]
    anything: Any


GOOD: dict[str, Any] = {
    "kind": "fir", "name": "a", "evergreen": True, "leaves": [{"count": 1, "share": 2}],
    "counts": {"a": 0}, "anything": [None],
}  # fmt: skip


def test_data_of_the_right_types_becomes_the_dataclass() -> None:
    assert decode(Tree, GOOD, "tree") == Tree("fir", "a", True, (Leaf(1, 2),), {"a": 0}, [None])
    assert decode(Leaf, {"count": 3, "share": None}, "leaf") == Leaf(3, None)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"kind": "elm"}, "tree.kind is one of oak, fir, not 'elm'"),
        ({"kind": ["fir"]}, "tree.kind"),
        ({"name": 5}, "tree.name is text, not 5"),
        ({"evergreen": 1}, "tree.evergreen is true or false"),
        ({"leaves": "leaf"}, "tree.leaves is a list"),
        ({"leaves": [{"count": -5, "share": None}]}, r"tree.leaves\[0\].count is -5: out of range"),
        ({"leaves": [{"count": 1.5, "share": None}]}, "count is a whole number, not 1.5"),
        ({"leaves": [{"count": True, "share": None}]}, "count is a whole number, not True"),
        ({"leaves": [{"count": 1, "share": float("nan")}]}, "share is nan"),
        ({"leaves": [{"count": 1, "share": float("inf")}]}, "share is inf"),
        ({"leaves": [{"count": 1, "share": "1"}]}, "share is a number, not '1'"),
        ({"leaves": [{"count": 10**5000, "share": None}]}, "hundreds of digits"),
        ({"leaves": [{"count": 1}]}, r"tree.leaves\[0\].share is missing"),
        ({"leaves": [5]}, r"tree.leaves\[0\] is an object, not 5"),
        ({"counts": {"a": "1"}}, "tree.counts.a"),
        ({"counts": 5}, "tree.counts is an object"),
        ({"surprise": 1}, "tree.surprise is not known"),
    ],
)
def test_anything_else_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        decode(Tree, GOOD | changes, "tree")
