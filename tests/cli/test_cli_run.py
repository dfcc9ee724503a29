"""ullage run, as a shell sees it, on a tiny model."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ullage.specs.sources import catalog
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who

Ullage = Callable[..., subprocess.CompletedProcess[str]]
SIZED = ["--device", "cpu-16gb"]


@pytest.fixture
def tiny_folder(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


def test_the_text_is_on_stdout_and_the_peak_on_stderr(ullage: Ullage, tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--max-new-tokens", "5", *SIZED]
    named = ullage(*words, "--prompt", "w6 w7 w8")
    piped = ullage(*words, "-", stdin="w6 w7 w8")
    assert named.returncode == 0, named.stderr
    assert 0 < len(named.stdout.split()) <= 5  # special tokens are not shown
    assert piped.stdout == named.stdout
    assert "planned peak" in named.stderr
    assert "measured" in named.stderr


def test_a_plan_file_is_run_as_it_says(ullage: Ullage, tiny_folder: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.json"
    made = ullage("plan", str(tiny_folder), *SIZED, "--prefill-chunk", "7", "--json")
    plan.write_text(made.stdout)
    done = ullage(
        "run", str(tiny_folder), "--plan", str(plan), "--prompt", "w6", "--max-new-tokens", "1"
    )
    assert done.returncode == 0, done.stderr
    assert "chunks of 7" in done.stderr


def test_a_bank_reads_a_prompt_longer_than_the_context(ullage: Ullage, tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--prompt", "w6 w7 w8 " * 100, "--max-new-tokens", "2"]
    refused = ullage(*words, *SIZED)
    assert refused.returncode == 2
    assert "300 tokens" in refused.stderr
    done = ullage(*words, *SIZED, "--technique", "camelot:slots=16,segment=16")
    assert done.returncode == 0, done.stderr


def test_a_budget_that_cannot_work_names_one_that_does(ullage: Ullage, tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--prompt", "w6", "--max-new-tokens", "1", *SIZED]
    refused = ullage(*words, "--memory", "10MiB")
    assert refused.returncode == 1
    assert refused.stderr.count("--memory ") == 1
    enough = refused.stderr.split("--memory ")[1].split()[0]
    assert ullage(*words, "--memory", enough).returncode == 0


@pytest.mark.parametrize("command", [["run", "--prompt", "w6"], ["audit"]])
def test_what_no_budget_would_run_is_refused_before_the_budget(
    ullage: Ullage, tmp_path: Path, command: list[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(catalog()["mixtral-8x7b"]["config"]))
    name, *words = command
    done = ullage(name, str(tmp_path), *words, "--memory", "8MiB", *SIZED)
    assert done.returncode == 2
    assert "is planned by ullage, and not run yet" in done.stderr


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--prompt", ""], "empty"),
        (["--prompt", "w6 " * 300], "300 tokens"),
        ([], "Give one prompt"),
        (["--prompt-file", "/no/such/file"], "from /no/such/file: No such file"),
        (["--prompt", "w6", "--memory", "-1GiB"], "size"),
        (["--prompt", "w6", "--attention", "eager"], "--attention eager: ullage run has kernels"),
        (["--prompt", "w6", "--attention", "flash"], "--attention flash: ullage run has kernels"),
        (["--prompt", b"w6 \xff"], "Cannot read the prompt as UTF-8"),
        (["--prompt", "w6", "--temperature", "1e-40"], "temperature is 0, or from 0.001"),
        (["--prompt", "w6", "--temperature", "nan"], "temperature is 0, or from 0.001"),
        (["--prompt", "w6", "--temperature", "inf"], "temperature is 0, or from 0.001"),
        (["--prompt", "w6", "--temperature", "-1"], "temperature is 0, or from 0.001"),
        (["--prompt", "w6", "--seed", "99999999999999999999"], "--seed"),
        (["--prompt", "w6", "--device", "rtx-4090"], "cannot run here"),
        (["--prompt", "w6", "--kv-cache-dtype", "fp8"], "int8 takes the same bytes"),
    ],
)
def test_bad_input_is_two_lines_and_exit_code_2(
    ullage: Ullage, tiny_folder: Path, words: list[str | bytes], says: str
) -> None:
    done = ullage("run", str(tiny_folder), *SIZED, *words)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert says in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("tokens", [5000, 9000])  # counted, and told by their beginning
def test_a_prompt_that_is_too_long_hears_what_reads_it(
    typed: Ullage, copied_folder: Path, tokens: int
) -> None:
    """Unless that was chosen already, or the model's context has no place for its slots."""
    words = ["run", str(copied_folder), "--prompt", "w6 " * tokens, *SIZED]
    way_out = "`--technique camelot` reads texts of any length"
    assert "camelot" not in typed(*words).stderr
    path = copied_folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 4096}))
    done = typed(*words)
    assert done.returncode == 2
    assert done.stderr.endswith(f": {way_out}.\n")
    assert (
        "`--technique camelot` in place of dms reads" in typed(*words, "--technique", "dms").stderr
    )
    done = typed(*words, "--technique", "camelot:slots=5000")
    assert done.returncode == 2
    assert "camelot" not in done.stderr


def test_a_gguf_file_runs_like_the_model_it_was_made_from(
    ullage: Ullage, gguf_file: Path, tmp_path: Path
) -> None:
    words = ["run", str(gguf_file), "--prompt", "the cat", "--max-new-tokens", "6", *SIZED]
    first = ullage(*words, ULLAGE_CACHE=str(tmp_path))
    again = ullage(*words, ULLAGE_CACHE=str(tmp_path))
    assert first.returncode == 0, first.stderr
    assert "Converting tiny.gguf" in first.stderr
    assert "Converting" not in again.stderr
    assert 0 < len(first.stdout.strip()) <= 12
    assert again.stdout == first.stdout


def test_chat_wraps_the_prompt_in_the_models_template(ullage: Ullage, tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--max-new-tokens", "5", *SIZED]
    wrapped = ullage(*words, "--chat", "--prompt", "w6 w7")
    by_hand = ullage(*words, "--prompt", "user w6 w7 assistant")
    assert wrapped.returncode == 0, wrapped.stderr
    assert wrapped.stdout == by_hand.stdout
    assert wrapped.stdout != ullage(*words, "--prompt", "w6 w7").stdout


def test_chat_without_a_template_is_refused(ullage: Ullage, copied_folder: Path) -> None:
    (copied_folder / "chat_template.jinja").unlink()
    done = ullage("run", str(copied_folder), "--chat", "--prompt", "w6", *SIZED)
    assert done.returncode == 2
    assert "no chat template" in done.stderr


def test_what_was_chosen_to_fit_is_said_with_its_reason(ullage: Ullage, tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--max-new-tokens", "1", "--prompt", "w6 " * 200, *SIZED]
    plan = ["plan", str(tiny_folder), "--max-model-len", "201", "--output-len", "1", *SIZED]
    whole = json.loads(ullage(*plan, "--json").stdout)["peak_bytes"]
    tight = ullage(*words, "--memory", str(whole - 1))
    assert tight.returncode == 0, tight.stderr
    assert "would need" in tight.stderr
    assert "chunks of 128" in tight.stderr  # the first that does not read the prompt in one pass
    assert "nothing had to shrink" in ullage(*words, "--memory", str(whole)).stderr


def test_a_prompt_of_other_bytes_is_refused_wherever_it_comes_from(
    tiny_folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"w6 \xff")
    command = [sys.executable, "-m", "ullage", "run", str(tiny_folder), *SIZED]
    for words, where in ((["-"], "stdin"), (["--prompt-file", str(file)], str(file))):
        done = subprocess.run(
            [*command, *words], input=b"w6 \xff", capture_output=True, check=False,
            env={**os.environ, "ULLAGE_DEBUG": "1", "LC_ALL": "C"},
        )  # fmt: skip
        assert done.returncode == 2
        assert f"Cannot read the prompt from {where} as UTF-8" in done.stderr.decode()


@pytest.mark.parametrize(
    ("planned", "words", "says"),
    [
        ([], ["--weights", "int8"], "--weights and --plan"),
        ([], ["--prefill-chunk", "9"], "--prefill-chunk and --plan"),
        ([], ["--kv-cache-dtype", "bf16"], "--kv-cache-dtype and --plan"),
        ([], ["--technique", "quantization"], "--technique and --plan"),
        ([], ["--recipe", "hybrid"], "--recipe and --plan"),
        ([], ["--device", "cpu"], "--device and --plan"),
        (["--engine", "transformers"], [], "for transformers"),
        (["--attention", "eager"], [], "attention eager"),
        (["--device", "rtx-4090"], [], "rtx-4090 cannot run here"),
    ],
)
def test_what_a_plan_decides_is_not_asked_for_twice_and_what_cannot_run_is_refused(
    ullage: Ullage,
    tiny_folder: Path,
    tmp_path: Path,
    planned: list[str],
    words: list[str],
    says: str,
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(ullage("plan", str(tiny_folder), *SIZED, *planned, "--json").stdout)
    done = ullage("run", str(tiny_folder), "--plan", str(plan), "--prompt", "w6", *words)
    assert done.returncode == 2
    assert says in done.stderr


def test_a_plan_of_another_model_is_refused(
    ullage: Ullage, tiny_folder: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    plan = tmp_path / "plan.json"
    plan.write_text(ullage("plan", str(model_folder("qwen2")), *SIZED, "--json").stdout)
    done = ullage("run", str(tiny_folder), "--plan", str(plan), "--prompt", "w6")
    assert done.returncode == 2
    assert "not this model" in done.stderr


def test_a_seed_draws_the_same_text_again(ullage: Ullage, tiny_folder: Path) -> None:
    words = ["run", str(tiny_folder), "--prompt", "w6", "--temperature", "5", *SIZED]
    texts = [ullage(*words, "--seed", seed).stdout for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("content", ["x'00'", "replace(after, 'w30', 'w31')"])
def test_a_fact_that_was_changed_is_not_said(
    ullage: Ullage, tiny_folder: Path, tmp_path: Path, content: str
) -> None:
    facts = tmp_path / "facts.db"
    with Ledger(facts, create=True) as ledger:
        for word in ("w40", "w20", "w50"):
            fact = Fact.make(prompt=f"{word} w21", answer="w30", subject=word)
            ledger.add([fact], Who("me"))
        ledger._connection.execute("DROP TRIGGER events_stay")
        ledger._connection.execute(f"UPDATE events SET after = {content} WHERE number = 2")
    done = ullage("run", str(tiny_folder), *SIZED, "--prompt", "w20 w21", "--facts", str(facts))
    assert (done.returncode, done.stdout) == (2, "")
    assert "event 2 is not as it was written" in done.stderr
    assert "behind fact" not in done.stderr


def test_a_prompt_is_read_behind_the_fact_that_it_is_about(
    ullage: Ullage, tiny_folder: Path, tmp_path: Path
) -> None:
    facts = tmp_path / "facts.db"
    words = ["run", str(tiny_folder), "--max-new-tokens", "5", *SIZED, "--prompt", "w9 w20 w21"]
    with Ledger(facts, create=True) as ledger:
        ledger.add([Fact.make(prompt="w20 w21", answer="w30", subject="w20")], Who("me"))
    plain, knowing = ullage(*words), ullage(*words, "--facts", str(facts))
    assert knowing.returncode == 0, knowing.stderr
    assert "behind fact 1: w20 w21 w30" in knowing.stderr
    assert knowing.stdout != plain.stdout
    chosen = ["--technique", f"larimar:ledger={facts}"]
    named = ullage(*words, *chosen)
    (tmp_path / "plan.json").write_text(
        ullage("plan", str(tiny_folder), *SIZED, *chosen, "--json").stdout
    )
    planned = ullage(*words[:4], *words[6:], "--plan", str(tmp_path / "plan.json"))
    for other in (named, planned):
        assert other.stdout == knowing.stdout
        assert "behind fact 1: w20 w21 w30" in other.stderr
    sparse = ullage(*words, "--facts", str(facts), "--technique", "camelot:slots=16,segment=16")
    assert sparse.returncode == 0, sparse.stderr
    asked = ullage("memory", "ask", str(tiny_folder), str(facts), "w9 w20 w21",
                   "--max-new-tokens", "5", "--memory", "4GiB")  # fmt: skip
    assert asked.stdout == knowing.stdout
    with Ledger(facts) as ledger:
        ledger.forget([1], Who("me"))
    forgotten = ullage(*words, "--facts", str(facts))
    assert "none of 0 facts is about this prompt" in forgotten.stderr
    assert forgotten.stdout == plain.stdout
    missing = ullage(*words, "--facts", "/no/such.db")
    assert (missing.returncode, "no ledger at" in missing.stderr) == (2, True)
    plan = ["run", str(tiny_folder), "--prompt", "w6", "--plan", "plan.json"]
    assert "--facts and --plan" in ullage(*plan, "--facts", str(facts)).stderr


@pytest.mark.parametrize("way", ["--facts", "--technique", "--plan"])
def test_a_chat_is_about_the_users_words_alone(
    ullage: Ullage, tiny_folder: Path, tmp_path: Path, way: str
) -> None:
    """And not about those of the template, however the ledger is named."""
    facts, plan = tmp_path / "facts.db", tmp_path / "plan.json"
    with Ledger(facts, create=True) as ledger:
        for word in ("w20", "user"):
            fact = Fact.make(prompt=f"{word} w21", answer="w30", subject=word)
            ledger.add([fact], Who("me"))
    chosen = {"--facts": str(facts), "--technique": f"larimar:ledger={facts}", "--plan": str(plan)}
    if way == "--plan":
        planned = ("--technique", chosen["--technique"], "--json")
        plan.write_text(ullage("plan", str(tiny_folder), *SIZED, *planned).stdout)
    words = ["run", str(tiny_folder), "--chat", "--max-new-tokens", "5", "--prompt"]
    named = [way, chosen[way], *(SIZED if way != "--plan" else ())]
    about, other = (ullage(*words, prompt, *named) for prompt in ("w9 w20 w21", "w9 w22 w23"))
    assert about.returncode == 0, about.stderr
    assert "behind fact 1: w20 w21 w30" in about.stderr
    assert about.stdout != ullage(*words, "w9 w20 w21", *SIZED).stdout
    assert "none of 2 facts is about this prompt" in other.stderr
    assert other.stdout == ullage(*words, "w9 w22 w23", *SIZED).stdout
