"""ullage read and ullage run --bank, as a shell sees them, on a tiny model."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from ullage.specs.saved import read_saved

Ullage = Callable[..., subprocess.CompletedProcess[str]]
SIZED = ["--device", "cpu-16gb"]
BANK = "camelot:slots=16,segment=16,recent=8"
TEXT = " ".join(f"w{6 + number * number % 58}" for number in range(300))  # beyond the context
QUESTION = "w40 w7 w9"
ASKED = ["--prompt", QUESTION, "--max-new-tokens", "8", *SIZED]


@pytest.fixture(scope="module")
def tiny_folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def bank(ullage: Ullage, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `TEXT`, read by the tiny llama."""
    folder = tmp_path_factory.mktemp("banks")
    (folder / "book.txt").write_text(TEXT)
    words = ["--save", str(folder / "book.bank"), "--technique", BANK, *SIZED]
    done = ullage("read", str(tiny_folder), str(folder / "book.txt"), *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "300 tokens of book.txt read in" in done.stderr
    assert "planned peak" in done.stderr
    return folder / "book.bank"


def with_beginning(folder: Path) -> Path:
    """Its tokenizer puts <bos> before a text, and its chat template before a conversation."""
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    special = {"id": "<bos>", "ids": [2], "tokens": ["<bos>"]}
    begin, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"id": "A", "type_id": 0}
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": text}],
        "pair": [begin, {"Sequence": text}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<bos>": special},
    }
    path.write_text(json.dumps(tokenizer))
    template = folder / "chat_template.jinja"
    template.write_text("<bos> " + template.read_text())
    return folder


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
def test_a_question_is_answered_as_behind_the_text(
    ullage: Ullage, tiny_folder: Path, tmp_path: Path, kv_dtype: str
) -> None:
    """As often as it is asked."""
    path, kept = str(tmp_path / "bank"), ["--technique", BANK, "--kv-cache-dtype", kv_dtype]
    done = ullage("read", str(tiny_folder), "-", "--save", path, *kept, *SIZED, stdin=TEXT)
    assert done.returncode == 0, done.stderr
    record = read_saved(Path(path)).record
    assert (record.tokens, record.kv_dtype, record.document) == (300, kv_dtype, "stdin")
    whole = ullage("run", str(tiny_folder), "--prompt", f"{TEXT} {QUESTION}", *kept, *ASKED[2:])
    content = Path(path).read_bytes()
    for _ in range(2):
        asked = ullage("run", str(tiny_folder), "--bank", path, *ASKED)
        assert asked.returncode == 0, asked.stderr
        assert asked.stdout == whole.stdout
        assert "3 prompt tokens behind 300 read in" in asked.stderr
    assert Path(path).read_bytes() == content


def test_no_second_beginning_stands_before_a_question(
    ullage: Ullage, copied_folder: Path, tmp_path: Path
) -> None:
    """Nor before a conversation."""
    folder, path = str(with_beginning(copied_folder)), str(tmp_path / "bank")
    kept = ["--technique", BANK]
    done = ullage("read", folder, "-", "--save", path, *kept, *SIZED, stdin=TEXT)
    assert "301 tokens" in done.stderr
    for words, same in ((["--chat"], f"user {QUESTION} assistant"), ([], QUESTION)):
        asked = ullage("run", folder, "--bank", path, *ASKED, *words)
        whole = ullage("run", folder, "--prompt", f"{TEXT} {same}", *kept, *ASKED[2:])
        assert f"{len(same.split())} prompt tokens behind 301" in asked.stderr
        assert asked.stdout == whole.stdout != ""


def test_what_the_bank_says_may_be_said_again(
    ullage: Ullage, tiny_folder: Path, bank: Path
) -> None:
    words = ["run", str(tiny_folder), "--bank", str(bank), *ASKED]
    plain = ullage(*words)
    again = ullage(*words, "--technique", BANK, "--kv-cache-dtype", "float32")
    assert plain.returncode == again.returncode == 0, again.stderr
    assert again.stdout == plain.stdout
    smaller = ullage(*words, "--weights", "int8", "--prefill-chunk", "2")
    assert smaller.returncode == 0, smaller.stderr
    assert "int8 weights, camelot" in smaller.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--technique", "camelot:slots=17"], "--technique camelot:slots=17 and --bank"),
        (["--technique", "dms"], "--technique dms and --bank"),
        (["--kv-cache-dtype", "int8"], "--kv-cache-dtype int8 and --bank"),
        (["--plan", "plan.json"], "--bank and --plan"),
    ],
)
def test_what_the_bank_decides_is_not_contradicted(
    typed: Ullage, tiny_folder: Path, bank: Path, words: list[str], says: str
) -> None:
    done = typed("run", str(tiny_folder), "--bank", str(bank), *ASKED[:4], *words)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_bank_of_a_model_of_another_shape_is_refused(
    typed: Ullage, model_folder: Callable[[str], Path], bank: Path
) -> None:
    """Before any weight is read."""
    done = typed("run", str(model_folder("gemma3_text")), "--bank", str(bank), *ASKED)
    assert done.returncode == 2
    assert "of llama, a model of 2 layers" in done.stderr
    assert "Run what it was read with, or read the text again." in done.stderr
    assert "planned peak" not in done.stderr


def test_a_bank_of_other_weights_is_refused(typed: Ullage, copied_folder: Path, bank: Path) -> None:
    weights = load_file(copied_folder / "model.safetensors")
    weights["model.norm.weight"][3] = 2.0
    save_file(weights, copied_folder / "model.safetensors", {"format": "pt"})
    done = typed("run", str(copied_folder), "--bank", str(bank), *ASKED)
    assert done.returncode == 2
    assert "it is of llama, whose weights are not those of copied" in done.stderr


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (lambda content: None, "Cannot read"),
        (lambda content: b"once upon a time", "No bank can be read"),
        (lambda content: content[:-10], "or no end. Read the text again: `ullage read"),
        (lambda content: content.replace(b"ullage-bank-2", b"ullage-bank-7"), "ullage-bank-7"),
        (lambda content: content[:-10] + b"\x01" * 10, "is damaged: read the text again"),
    ],
)
def test_a_bad_bank_is_refused(
    typed: Ullage,
    tiny_folder: Path,
    bank: Path,
    tmp_path: Path,
    content: Callable[[bytes], bytes | None],
    says: str,
) -> None:
    changed = content(bank.read_bytes())
    if changed is not None:
        (tmp_path / "bad.bank").write_bytes(changed)
    done = typed("run", str(tiny_folder), "--bank", str(tmp_path / "bad.bank"), *ASKED)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_models_weights_are_no_bank(typed: Ullage, tiny_folder: Path) -> None:
    weights = str(tiny_folder / "model.safetensors")
    done = typed("run", str(tiny_folder), "--bank", weights, *ASKED)
    assert done.returncode == 2
    assert "is no bank" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--technique", "dms"], "banks, which camelot has"),
        (["--technique", "quantization"], "banks, which camelot has"),
        (["--technique", "camelot:slots=0"], "no bank to keep"),
        (["--technique", "camelot", "--technique", "dms"], "Only one technique"),
        (["--save", "/no/such/folder/bank"], "Cannot write"),
        (["--save", "/dev/null"], "--save /dev/null is no file"),
        (["--memory", "1MiB"], "with this text does not fit in 1.0 MiB: --memory"),
        (["--technique", "camelot:slots=300"], "The text has 300 tokens"),
    ],
)
def test_a_reading_that_cannot_be_is_refused_early(
    typed: Ullage, tiny_folder: Path, tmp_path: Path, words: list[str], says: str
) -> None:
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    save = ["--save", str(tmp_path / "bank")]
    done = typed("read", str(tiny_folder), str(text), *save, *SIZED, *words)
    assert done.returncode in (1, 2)
    assert says in done.stderr
    assert "planned peak" not in done.stderr
    assert list(tmp_path.iterdir()) == [text]


@pytest.mark.parametrize("named", ["book.txt", "link"])
def test_the_text_is_not_overwritten(
    typed: Ullage, tiny_folder: Path, tmp_path: Path, named: str
) -> None:
    text = tmp_path / "book.txt"
    text.write_text(TEXT)
    (tmp_path / "link").symlink_to(text)
    done = typed("read", str(tiny_folder), str(text), "--save", str(tmp_path / named), *SIZED)
    assert done.returncode == 2
    assert "would overwrite the text: name another file" in done.stderr
    assert text.read_text() == TEXT


def test_a_bank_that_cannot_be_written_names_its_file(
    typed: Ullage, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    save = tmp_path / "bank"
    words = ["--save", str(save), "--technique", BANK, *SIZED]
    (tmp_path / "book.txt").write_text(TEXT)
    done = typed("read", str(tiny_folder), str(tmp_path / "book.txt"), *words)
    assert done.returncode == 2
    assert f"Cannot write {save}: No space left on device." in done.stderr
    assert not save.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "Cannot read the text from "),
        (b"", "The text is empty or only blank: there is nothing to read"),
        (b" \n", "The text is empty or only blank"),
        (b"w6 \xff", "book.txt as UTF-8 text"),
    ],
)
def test_what_is_no_text_is_refused(
    typed: Ullage, tiny_folder: Path, tmp_path: Path, content: bytes | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "book.txt").write_bytes(content)
    save = ["--save", str(tmp_path / "bank")]
    done = typed("read", str(tiny_folder), str(tmp_path / "book.txt"), *save, *SIZED)
    assert done.returncode == 2
    assert says in done.stderr
    assert ("UTF-8" in done.stderr) == (content == b"w6 \xff")


def test_a_model_without_rotary_positions_keeps_no_bank(
    typed: Ullage, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    words = [str(tmp_path / "book.txt"), "--save", str(tmp_path / "bank"), *SIZED]
    done = typed("read", str(model_folder("gpt2")), *words)
    assert done.returncode == 2
    assert not (tmp_path / "bank").exists()
