"""Sizes and token counts, as typed and as printed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ullage.errors import SizeError
from ullage.units import GIB, KIB, MIB, TIB, format_bytes, parse_bytes, parse_tokens


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        ("24 GiB", 24 * GIB),
        (" 24GiB ", 24 * GIB),
        ("24GB", 24 * 10**9),
        ("900MiB", 900 * MIB),
        ("1.5KiB", 1536),
        ("2TiB", 2 * TIB),
        ("1048576", MIB),
        ("1b", 1),
    ],
)
def test_bytes(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


def test_a_share_needs_a_whole() -> None:
    assert parse_bytes("80%", 1000) == 800
    assert parse_bytes("100%", 1000) == 1000
    for text, whole in (("80%", None), ("101%", 1000), ("0%", 1000)):
        with pytest.raises(SizeError):
            parse_bytes(text, whole)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("8192", 8192), ("32K", 32_768), ("32k", 32_000), ("1M", 1 << 20), ("1.5k", 1500)],
)
def test_tokens(text: str, expected: int) -> None:
    assert parse_tokens(text) == expected


NONSENSE = ["", " ", "GiB", "-1GiB", "12parsecs", "1e9", "0x10", "nan", "inf", "1,5GiB", "٣GiB",
            "1GiB\n2", "1..5", ".5GiB", "0", "0GiB", "9" * 400, "1 2", "\0", "½GiB"]  # fmt: skip


@pytest.mark.parametrize("text", NONSENSE)
def test_nonsense_is_a_size_error(text: str) -> None:
    with pytest.raises(SizeError):
        parse_bytes(text)
    with pytest.raises(SizeError):
        parse_tokens(text)


@pytest.mark.parametrize("text", ["0.5", "1.5", "32g", "32KiB", "80%"])
def test_no_whole_token_count(text: str) -> None:
    with pytest.raises(SizeError):
        parse_tokens(text)


@given(st.text(max_size=30))
def test_any_text_parses_or_is_a_size_error(text: str) -> None:
    for parse in (parse_bytes, parse_tokens):
        try:
            size = parse(text)
        except SizeError:
            continue
        assert isinstance(size, int)
        assert size > 0


@given(st.integers(1, 1 << 45))
def test_plain_numbers_are_themselves(size: int) -> None:
    assert parse_tokens(str(size)) == size
    assert parse_bytes(f"{size}B") == size
    if size >= MIB:
        assert parse_bytes(str(size)) == size


@pytest.mark.parametrize("text", ["20", " 24 ", "1.5", "1048575"])
def test_a_small_number_without_a_unit_is_not_taken_for_bytes(text: str) -> None:
    with pytest.raises(SizeError, match=f"Write {text.strip()}GiB, or [0-9]+B for bytes"):
        parse_bytes(text)


@given(st.integers(1, 1000 * TIB))
def test_what_is_printed_can_be_parsed(size: int) -> None:
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05)


@given(st.integers(1, 1023), st.sampled_from([1, KIB, MIB, GIB, TIB]))
def test_what_prints_exactly_is_parsed_exactly(number: int, unit: int) -> None:
    assert parse_bytes(format_bytes(number * unit)) == number * unit


@given(st.integers(1, 1000 * TIB))
def test_what_is_printed_and_parsed_prints_the_same(size: int) -> None:
    printed = format_bytes(size)
    assert format_bytes(parse_bytes(printed)) in (printed, _carried(printed))


def _carried(printed: str) -> str:
    """``1024.0 KiB`` is a whole of the next unit."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    number, unit = printed.split()
    if float(number) != 1024 or unit == "TiB":
        return printed
    return format_bytes(1024 ** (units.index(unit) + 1))


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 B"), (512, "512 B"), (-3 * MIB, "-3.0 MiB"), (round(1.46 * GIB), "1.46 GiB"),
     (TIB, "1.00 TiB"), (KIB, "1.0 KiB")],
)  # fmt: skip
def test_print(size: int, text: str) -> None:
    assert format_bytes(size) == text
