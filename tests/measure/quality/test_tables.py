"""GLUE's files as they are handed out, made up in a few lines."""

from pathlib import Path

import pytest

from ullage.errors import InputError
from ullage.measure.quality.glue import FORMS
from ullage.measure.quality.tables import Row, read_glue

FILES = {
    "sst2_train.tsv": "good film\t1\nbad film\t0\n",
    "sst2_dev.tsv": "a fine film\t1\n",
    "mrpc_train.txt": '\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA b.\tB "a.\n',
    "mrpc_test.txt": "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\r\n0\t7\t8\tC d.\tE f.\r\n",
    "rte_train.tsv": "sentence1\tsentence2\tlabel\tidx\nIt rains.\tIt is wet.\t0\t0\n",
    "rte_dev.tsv": "sentence1\tsentence2\tlabel\tidx\nIt\u2028rains.\tIt snows.\t1\t0\n",
    "cola_in_train.tsv": "gj04\t0\t*\tThem goes.\n",
    "cola_in_dev.tsv": "gj04\t1\t\tThey go.\n",
    "qnli_dev.tsv": "index\tquestion\tsentence\tlabel\n"
    + "".join(f"{n}\tWho {n}?\tHe {n}.\t{'not_' * (n % 2)}entailment\n" for n in range(203)),
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "glue"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_bytes(text.encode())
    return tmp_path


def test_every_field_is_found_in_its_column(data: Path) -> None:
    found = read_glue(data)
    assert [len(table.shots) for table in found.values()] == [2, 1, 1, 1, 200]
    assert {name: table.scored[0] for name, table in found.items()} == {
        "sst2": Row({"sentence": "a fine film"}, 1),
        "mrpc": Row({"sentence1": "C d.", "sentence2": "E f."}, 0),
        "rte": Row({"sentence1": "It\u2028rains.", "sentence2": "It snows."}, 1),
        "cola": Row({"sentence": "They go."}, 1),
        "qnli": Row({"question": "Who 200?", "sentence": "He 200."}, 0),
    }
    assert found["mrpc"].shots[0].texts["sentence2"] == 'B "a.'
    assert found["qnli"].scored[1].label == 1


def test_a_missing_file_and_a_broken_line_are_named(data: Path) -> None:
    broken = data / "glue" / "rte_dev.tsv"
    broken.write_text("header\nIt rains.\tIt is wet.\t7\t0\n")
    with pytest.raises(InputError, match=r"rte_dev.tsv, line 2"):
        read_glue(data)
    broken.write_text("header\nIt rains.\n")
    with pytest.raises(InputError, match=r"rte_dev.tsv, line 2"):
        read_glue(data)
    broken.unlink()
    with pytest.raises(InputError, match=r"Cannot read .*rte_dev.tsv"):
        read_glue(data)
    with pytest.raises(InputError, match="no folder"):
        read_glue(data / "glue")


def test_every_set_has_a_form_for_all_its_texts(data: Path) -> None:
    tables = read_glue(data)
    assert tables.keys() == FORMS.keys()
    for name, table in tables.items():
        asked = FORMS[name].asked(table.scored[0])
        assert all(text in asked for text in table.scored[0].texts.values())
