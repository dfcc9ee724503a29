"""Parse and print sizes in bytes and counts of tokens.

Bytes: ``24GiB`` is binary, ``24GB`` decimal, ``80%`` a share of something. Tokens: ``32K`` is
32,768 and ``32k`` is 32,000, as in vLLM.
"""

import re

from ullage.errors import SizeError

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40

_BYTE_UNITS = {
    "b": 1,
    "kib": KIB, "mib": MIB, "gib": GIB, "tib": TIB,
    "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
}  # fmt: skip
_TOKEN_UNITS = {"": 1, "k": 1_000, "K": 1 << 10, "m": 1_000_000, "M": 1 << 20}
_NUMBER = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z%]*)", re.ASCII)


def parse_bytes(text: str, whole_bytes: int | None = None) -> int:
    """Bytes in `text`: ``24GiB``, ``900MiB``, ``24GB``, ``1048576``, or ``80%`` of `whole_bytes`.

    Raises:
        SizeError: `text` is no positive size, a percentage with nothing to take it of, or a number
            without a unit that is too small to be meant in bytes.
    """
    number, unit = _split(text, "size", "24GiB, 24GB, 900MiB or 80%")
    if unit == "%":
        if whole_bytes is None:
            raise SizeError(f"{text!r} is a share; here an absolute size is needed, as in 24GiB.")
        if number > 100:
            raise SizeError(f"{text!r} is more than the whole.")
        size_bytes = int(whole_bytes * number / 100)
    else:
        factor = _BYTE_UNITS.get(unit.lower()) if unit else 1
        if factor is None:
            raise SizeError(f"{text!r} has no unit that is known. Write 24GiB, 24GB or 900MiB.")
        size_bytes = int(number * factor)
    if size_bytes <= 0:
        raise SizeError(f"{text!r} is not a positive size.")
    if not unit and size_bytes < MIB:
        raise SizeError(
            f"{text!r} has no unit. Write {text.strip()}GiB, or {size_bytes}B for bytes."
        )
    return size_bytes


def parse_tokens(text: str) -> int:
    """Tokens in `text`: ``8192``, ``32K`` (32,768) or ``32k`` (32,000).

    Raises:
        SizeError: `text` is no positive whole count.
    """
    number, unit = _split(text, "token count", "8192, 32K (32,768) or 32k (32,000)")
    tokens = number * _TOKEN_UNITS.get(unit, 0)
    if tokens < 1 or tokens != int(tokens):
        raise SizeError(f"{text!r} is not a positive token count. Write 8192, 32K or 32k.")
    return int(tokens)


def _split(text: str, what: str, examples: str) -> tuple[float, str]:
    match = _NUMBER.fullmatch(text.strip())
    if match is None or len(match[1]) > 20:
        raise SizeError(f"{text!r} is not a {what}. Write {examples}.")
    return float(match[1]), match[2]


def format_bytes(size_bytes: int) -> str:
    """`size_bytes` in the binary unit that reads best: ``1.46 GiB``, ``-3.0 MiB``, ``512 B``."""
    for factor, unit in ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB")):
        if abs(size_bytes) >= factor:
            return f"{size_bytes / factor:.{2 if factor >= GIB else 1}f} {unit}"
    return f"{size_bytes} B"
