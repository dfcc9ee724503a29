"""Plain texts and essays in a folder of data. No torch."""

import re
from pathlib import Path

from ullage.errors import InputError

KNOWN = ("books/moby_dick.txt", "wikitext2_test.txt")  # read by nobody who trains
_STARTS = {"moby_dick": "Call me Ishmael."}  # behind the table of contents and the extracts
_HEADER = re.compile(r"^\*\*\* ?START OF TH\w+ PROJECT GUTENBERG.*\*\*\*\s*$", re.MULTILINE)
_FOOTER = re.compile(r"^\*\*\* ?END OF TH\w+ PROJECT GUTENBERG", re.MULTILINE)


def read_texts(data: Path) -> dict[str, str]:
    """The texts that perplexity is measured on, by name: Moby Dick and the test part of WikiText-2
    where `data` has one of them, else each .txt file of it.

    Raises:
        InputError: no folder, no text in it, or one that cannot be read.
    """
    refuse_no_folder(data)
    files = [data / name for name in KNOWN if (data / name).is_file()] or sorted(data.glob("*.txt"))
    if not files:
        raise InputError(f"{data} holds none of {', '.join(KNOWN)}, and no other .txt file.")
    return {file.stem: _plain(file.stem, read_file(file)) for file in files}


def read_training_texts(data: Path) -> dict[str, str]:
    """The texts in `data` and in its folder ``books`` that are not there to test with, by name.

    Raises:
        InputError: no folder, no such text in it, or one that cannot be read.
    """
    refuse_no_folder(data)
    kept_back = {Path(name).name for name in KNOWN}
    files = sorted({*data.glob("*.txt"), *data.glob("books/*.txt")})
    files = [file for file in files if file.name not in kept_back]
    if not files:
        raise InputError(f"{data} holds no .txt file to learn from.")
    return {
        str(file.relative_to(data).with_suffix("")): _plain(file.stem, read_file(file))
        for file in files
    }


def read_essays(data: Path) -> str:
    """The essays in the folder ``essays`` of `data`, one after the other.

    Raises:
        InputError: no folder, no essay in it, or one that cannot be read.
    """
    folder = data / "essays"
    refuse_no_folder(folder)
    essays = [read_file(file) for file in sorted(folder.glob("*.txt"))]
    if not essays:
        raise InputError(f"{folder} holds no .txt file.")
    return "\n".join(essays)


def read_file(file: Path) -> str:
    """The text of `file`, without a byte order mark.

    Raises:
        InputError: no such file, or not UTF-8.
    """
    try:
        return file.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"Cannot read {file}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text.") from error


def refuse_no_folder(folder: Path) -> None:
    """
    Raises:
        InputError: `folder` is none.
    """
    if not folder.is_dir():
        raise InputError(f"--data: there is no folder {folder}.")


def _plain(name: str, text: str) -> str:
    """`text` without what Project Gutenberg puts before and after a book."""
    header, footer = _HEADER.search(text), _FOOTER.search(text)
    text = text[header.end() if header else 0 : footer.start() if footer else len(text)]
    return text[max(0, text.find(_STARTS.get(name, ""))) :]
