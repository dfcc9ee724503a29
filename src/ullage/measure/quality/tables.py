"""The tables of GLUE in a folder, as the sets are handed out. No torch."""

from dataclasses import dataclass
from pathlib import Path

from ullage.errors import InputError
from ullage.measure.quality.texts import read_file, refuse_no_folder

_SHOTS = 200  # first rows, where a set has no file of its own to take shots from
_LABELS = {"0": 0, "1": 1, "entailment": 0, "not_entailment": 1}


@dataclass(frozen=True)
class Row:
    """One example: its texts by their names, and which of two labels is right, 0 or 1."""

    texts: dict[str, str]
    label: int


@dataclass(frozen=True)
class Table:
    """One set: rows to take shots from, and rows to score."""

    shots: list[Row]
    scored: list[Row]


@dataclass(frozen=True)
class _Layout:
    """`shots` and `scored` are files, the same one where its first rows are the shots; `texts` and
    `label` say in which column they stand."""

    shots: str
    scored: str
    header: bool
    texts: dict[str, int]
    label: int


_LAYOUTS = {
    "sst2": _Layout("sst2_train.tsv", "sst2_dev.tsv", False, {"sentence": 0}, 1),
    "mrpc": _Layout("mrpc_train.txt", "mrpc_test.txt", True, {"sentence1": 3, "sentence2": 4}, 0),
    "rte": _Layout("rte_train.tsv", "rte_dev.tsv", True, {"sentence1": 0, "sentence2": 1}, 2),
    "cola": _Layout("cola_in_train.tsv", "cola_in_dev.tsv", False, {"sentence": 3}, 1),
    "qnli": _Layout("qnli_dev.tsv", "qnli_dev.tsv", True, {"question": 1, "sentence": 2}, 3),
}


def read_glue(data: Path) -> dict[str, Table]:
    """Each set in the folder ``glue`` of `data`, by its name in small letters.

    Raises:
        InputError: no folder, a file that is missing, or a line that is not a row.
    """
    folder = data / "glue"
    refuse_no_folder(folder)
    return {name: _table(folder, layout) for name, layout in _LAYOUTS.items()}


def _table(folder: Path, layout: _Layout) -> Table:
    shots = _rows(folder / layout.shots, layout)
    if layout.scored == layout.shots:
        return Table(shots[:_SHOTS], shots[_SHOTS:])
    return Table(shots, _rows(folder / layout.scored, layout))


def _rows(file: Path, layout: _Layout) -> list[Row]:
    lines = read_file(file).split("\n")  # and at no other sign that Unicode calls an end
    rows = []
    for number, line in enumerate(lines[layout.header :], start=1 + layout.header):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        try:
            texts = {name: cells[column] for name, column in layout.texts.items()}
            rows.append(Row(texts, _LABELS[cells[layout.label]]))
        except (IndexError, KeyError) as error:
            raise InputError(f"{file}, line {number}, is not a row of this set.") from error
    return rows
