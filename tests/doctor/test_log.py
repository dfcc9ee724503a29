"""Logs as they come: large, coloured, wrapped, damaged."""

from pathlib import Path

import pytest

from ullage.doctor import diagnose, log
from ullage.doctor.log import Log, read_log
from ullage.errors import InputError
from ullage.units import GIB, KIB


def lines_of(path: Path, raw: bytes, words: tuple[str, ...] = ("MiB", "GiB")) -> Log:
    path.write_bytes(raw)
    return read_log(path, words)


def test_colours_and_control_characters_are_dropped(tmp_path: Path) -> None:
    raw = b"\x1b[32mI \x1b[0mKV buffer size =\x07 \xff  12.00 MiB\r\n[34m1.2[0m 3 GiB\n"
    kept = lines_of(tmp_path / "log", raw)
    assert [line.text for line in kept.lines] == ["I KV buffer size = 12.00 MiB", "1.2 3 GiB"]


def test_windows_shells_write_utf_16(tmp_path: Path) -> None:
    kept = lines_of(tmp_path / "log", "free 3 GiB\r\n".encode("utf-16"))
    assert kept.lines[0].text == "free 3 GiB"


def test_only_what_is_worth_a_look_is_kept(tmp_path: Path) -> None:
    raw = b"nothing\n" * 10_000 + b"before\nfree 3 GiB\nafter\n" + b"nothing\n" * 10_000
    kept = lines_of(tmp_path / "log", raw)
    assert [line.number for line in kept.lines] == [10_001, 10_002, 10_003, 10_004, 10_005]


def test_a_long_log_keeps_its_start_and_its_end(tmp_path: Path) -> None:
    raw = b"first 1 GiB\n" + b"middle 2 GiB\n" * 30_000 + b"last 3 GiB\n"
    kept = lines_of(tmp_path / "log", raw)
    assert len(kept.lines) == 10_000
    assert (kept.lines[0].number, kept.lines[-1].number) == (1, 30_002)


def test_a_long_line_is_cut_and_still_one_line(tmp_path: Path) -> None:
    kept = lines_of(tmp_path / "log", b"1 GiB" + b"x" * 100_000 + b"\n2 GiB\n")
    assert [line.number for line in kept.lines] == [1, 2]
    assert len(kept.lines[0].text) <= 16_000


def test_a_log_beyond_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "MOST_BYTES", 1000)
    with pytest.raises(InputError, match="tail -c"):
        lines_of(tmp_path / "log", b"3 GiB\n" * 1000)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "missing", Path("a\0b")):
        with pytest.raises(InputError, match="Cannot read the log"):
            diagnose(path)


def test_a_message_is_found_across_lines_and_prefixes(tmp_path: Path) -> None:
    raw = b"(EngineCore pid=3) needs 24.0 GiB KV cach\n(EngineCore pid=3) e, has 3 GiB\n"
    found = lines_of(tmp_path / "log", raw).first(r"{wanted} KV cache, has {free}")
    assert found is not None
    assert (found.size("wanted"), found.size("free")) == (24 * GIB, 3 * GIB)
    assert found.line.number == 1


def test_the_next_line_never_adds_digits(tmp_path: Path) -> None:
    found = lines_of(tmp_path / "log", b"GiB rows=25\n600 GiB\n").first(r"rows={rows#}")
    assert found is not None
    assert found.count("rows") == 25


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("3 GB", 3 * GIB), ("3kB", 3 * KIB), ("-1.5 GiB", -3 * GIB // 2), ("17 bytes", 17)],
)
def test_units_are_binary_as_engines_mean_them(tmp_path: Path, text: str, size_bytes: int) -> None:
    found = lines_of(tmp_path / "log", f"size {text} GiB\n".encode()).first(r"size {size-}")
    assert found is not None
    assert found.size("size") == size_bytes
