"""The last size that fits, whatever the shape of the stairs."""

from hypothesis import given
from hypothesis import strategies as st

from ullage.planner.reach import last_that_fits


@given(
    st.integers(1, 300),
    st.integers(1, 100_000),
    st.integers(1, 40),
    st.integers(0, 2),
    st.integers(1, 4000),
    st.data(),
)
def test_it_is_exactly_the_last_that_fits(
    low: int, more: int, block: int, power: int, slope: int, data: st.DataObject
) -> None:
    most = low + more

    def bytes_at(size: int) -> int:
        return int(slope * -(-size // block) * size**power)

    budget = data.draw(st.integers(bytes_at(low), bytes_at(most) + 10))
    found = last_that_fits(bytes_at, low, bytes_at(low), most, budget)
    assert low <= found <= most
    assert bytes_at(found) <= budget
    assert found == most or bytes_at(found + 1) > budget


def test_a_line_takes_few_looks() -> None:
    looks = []

    def bytes_at(size: int) -> int:
        looks.append(size)
        return 1000 * size

    assert last_that_fits(bytes_at, 1, 1000, 1 << 40, 123_456_789) == 123_456
    assert len(looks) <= 4
