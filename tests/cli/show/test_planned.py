"""A plan in words: every figure in it is the plan's."""

import re
from dataclasses import replace
from io import StringIO

import pytest
from rich.console import Console

from ullage import Plan, Recipe, TechniqueChoice, Workload, build_plan, find_device, resolve
from ullage.cli.show import answers
from ullage.cli.show.planned import show_plan
from ullage.cli.show.sums import sums, sums_table
from ullage.planner import default_execution
from ullage.planner.engines import ENGINES
from ullage.planner.memory import explain
from ullage.specs.device import Device
from ullage.specs.workload import PHASES, Engine
from ullage.techniques.camelot.settings import CAMELoT
from ullage.units import GIB, format_bytes

CARD = find_device("rtx-4090")
WORK = Workload(4000, 96)
INT8 = TechniqueChoice("quantization", {"scheme": "int8"})
NF4 = TechniqueChoice("quantization", {"scheme": "nf4"})
DMS = TechniqueChoice("dms", {"kept": 0.125})
CAMELOT = TechniqueChoice("camelot", {"slots": 512})


def plan_of(
    engine: Engine = "ullage", *techniques: TechniqueChoice, budget_bytes: int | None = None,
    work: Workload = WORK, model: str = "llama-3.1-8b", device: Device = CARD,
) -> Plan:  # fmt: skip
    execution = default_execution(device, engine)
    return build_plan(Recipe(resolve(model), device, work, execution, techniques), budget_bytes)


def shown(plan: Plan, width: int = 160) -> str:
    out = StringIO()
    console = Console(file=out, width=width, soft_wrap=True, highlight=False, color_system=None)
    show_plan(console, plan, None)
    return out.getvalue()


def test_every_phase_is_a_row_of_its_parts() -> None:
    plan = plan_of()
    lines = shown(plan).splitlines()
    for name, part in plan.phases.items():
        (row,) = [line for line in lines if line.startswith(name)]
        sizes = (
            part.weights_bytes, part.kv_bytes, part.activation_bytes, part.logits_bytes,
            part.overhead_bytes, part.total_bytes,
        )  # fmt: skip
        words = re.split(r"\s{2,}", row)
        assert words[1:6] == [format_bytes(size) for size in sizes[:5]]
        assert words[6].startswith(format_bytes(sizes[5]))
        assert row.endswith(f"{part.total_bytes / plan.budget_bytes:.0%}")


def test_entries_that_transformers_has_not_are_the_arithmetics_in_its_one_pass() -> None:
    plain = plan_of().recipe
    narrow = replace(plain, execution=replace(plain.execution, kv_dtype="int8"))
    one_pass = [
        [line for line in shown(build_plan(recipe)).splitlines() if "prefill peaks at" in line]
        for recipe in (plain, narrow)
    ]
    assert len(one_pass[0]) == 2
    assert one_pass[0] == one_pass[1]


def test_the_bar_is_as_long_as_the_share_and_goes_where_there_is_no_room() -> None:
    plan = plan_of(budget_bytes=1 << 60)
    half = plan_of(budget_bytes=2 * plan.peak_bytes)
    row = next(line for line in shown(half).splitlines() if line.startswith("prefill"))
    share = half.phases["prefill"].total_bytes / half.budget_bytes
    assert row.count("█") == round(20 * share) == 10
    assert row.count("█") + row.count("░") == 20
    assert "█" not in shown(half, width=80)
    full = shown(plan_of(budget_bytes=plan.peak_bytes // 3))
    assert max(line.count("█") for line in full.splitlines()) == 20


def test_phases_keep_to_eighty_columns_whatever_their_size() -> None:
    for plan in (plan_of(), plan_of(work=Workload(100_000, 1000, 64), model="llama-3.1-70b")):
        table = shown(plan, width=80).splitlines()[2:6]
        assert [line.split()[0] for line in table] == ["phase", "load", "prefill", "decode"]
        assert max(map(len, table)) <= 80
        assert "…" not in "".join(table)
    assert "scratch, logits" in table[0]
    scratch = plan.phases["prefill"].activation_bytes + plan.phases["prefill"].logits_bytes
    assert f"  {format_bytes(scratch)}  " in table[2]


@pytest.mark.parametrize("terminal", [True, False])
def test_lines_end_between_words_on_a_terminal_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], terminal: bool
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", str(int(terminal)))
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    answers().print("word " * 30)
    assert len(capsys.readouterr().out.splitlines()) == (2 if terminal else 1)


def test_the_verdict_says_what_is_spare_or_too_much() -> None:
    peak = plan_of().peak_bytes
    assert "fits, 0 B to spare" in shown(plan_of(budget_bytes=peak))
    assert "fits, 3.0 MiB to spare" in shown(plan_of(budget_bytes=peak + (3 << 20)))
    assert "does not fit, 1 B too much" in shown(plan_of(budget_bytes=peak - 1))


def test_the_cliff_is_the_first_that_fails() -> None:
    plan = plan_of(budget_bytes=20 * GIB)
    text = shown(plan)
    assert plan.cliff.max_model_len is not None
    assert plan.cliff.max_num_seqs is not None
    assert (
        f"with 1 sequence the first context that fails is {plan.cliff.max_model_len + 1:,}" in text
    )
    assert f"the first batch that fails is {plan.cliff.max_num_seqs + 1:,} sequences" in text
    assert "holds 131,072 bytes of KV" in text
    assert "beyond the model's own context" not in text
    roomy = shown(plan_of(model="smollm2-135m"))
    assert "beyond the model's own context of 8,192" in roomy


def test_where_nothing_fits_there_is_no_cliff_to_name() -> None:
    text = shown(plan_of(budget_bytes=GIB))
    assert "Cliff: not even the shortest prompt fits." in text
    assert "first batch that fails" not in text


def test_a_limitless_length_has_no_first_that_fails() -> None:
    text = shown(plan_of(model="mistral-7b-v0.1"))
    assert "with 1 sequence no context fails." in text


def test_latency_is_given_with_its_band() -> None:
    plan = plan_of(work=Workload(4000, 96, 3))
    assert plan.latency is not None
    text = shown(plan)
    band = plan.latency.tokens_per_s_band
    assert (
        f"about {plan.latency.tokens_per_s:,.0f} tokens/s ({band.low:,.0f} to {band.high:,.0f})"
        in text
    )
    assert f"{plan.latency.sequence_tokens_per_s:,.0f} for each of 3 sequences" in text
    assert "for each of" not in shown(plan_of())
    assert "Latency" not in shown(plan_of(device=Device("x", "cuda", 80 * GIB)))


def test_a_low_rate_has_a_digit_more() -> None:
    plan = plan_of()
    assert plan.latency is not None
    slow = replace(plan, latency=replace(plan.latency, tokens_per_s=1.24))
    assert "then about 1.2 tokens/s" in shown(slow)


@pytest.mark.parametrize(
    ("engine", "one_pass", "outside"),
    [("ullage", True, False), ("transformers", True, False), ("vllm", False, True),
     ("sglang", False, False), ("llama.cpp", False, False)],
)  # fmt: skip
def test_each_engine_has_its_own_remarks(engine: Engine, one_pass: bool, outside: bool) -> None:
    text = shown(plan_of(engine))
    assert ("One pass, eager: prefill peaks at" in text) is one_pass
    assert ("Outside of this: prompt_logprobs" in text) is outside


def test_one_pass_is_compared_inside_the_same_budget() -> None:
    plan = plan_of(budget_bytes=20 * GIB)
    execution = default_execution(CARD, "transformers")
    other = build_plan(Recipe(plan.recipe.model, CARD, plan.recipe.workload, execution), 20 * GIB)
    prefill, last = other.phases["prefill"], other.cliff.max_model_len
    assert last is not None
    assert (
        f"sdpa:  prefill peaks at {format_bytes(prefill.total_bytes)} "
        f"({format_bytes(prefill.activation_bytes)} of it activations and scores), first fails at "
        f"{last + 1:,} tokens." in shown(plan)
    )  # fmt: skip


def test_what_is_planned_only_is_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "planned only" not in shown(plan_of("ullage", CAMELOT))
    monkeypatch.setattr(CAMELoT, "runs", False)
    assert "camelot is planned only" in shown(plan_of("ullage", CAMELOT))
    assert "planned only" not in shown(plan_of("ullage", DMS))
    assert "planned only" not in shown(plan_of("ullage", INT8))


ADDED: list[tuple[Engine, tuple[TechniqueChoice, ...]]] = [
    *((engine, ()) for engine in ENGINES),
    *(("ullage", (choice,)) for choice in (INT8, NF4, DMS, CAMELOT)),
    ("ullage", (NF4, DMS)), ("ullage", (INT8, CAMELOT)), ("transformers", (NF4,)),
]  # fmt: skip


@pytest.mark.parametrize(("engine", "techniques"), ADDED)
def test_the_lines_of_a_sum_are_its_total(
    engine: Engine, techniques: tuple[TechniqueChoice, ...]
) -> None:
    plan = plan_of(engine, *techniques, work=Workload(9000, 96, 3))
    explained = sums(plan, None)
    assert list(explained) == [*PHASES, "request"]
    for phase in PHASES:
        lines = explained[phase]
        assert sum(line["nbytes"] for line in lines) == plan.phases[phase].total_bytes
        for part in ("weights", "kv", "activation", "logits", "overhead"):
            there = sum(line["nbytes"] for line in lines if line["part"] == part)
            assert there == getattr(plan.phases[phase], f"{part}_bytes")
        assert all(line["source"] and line["label"] for line in lines)
        named = {line["what"] for line in lines}
        if phase == "decode":
            assert {choice.name for choice in techniques} <= named


def test_a_narrow_table_of_sums_has_each_source_under_its_line() -> None:
    out, plan = StringIO(), plan_of("vllm")
    console = Console(file=out, width=80, color_system=None)
    console.print(sums_table(plan, None, wide=False))
    lines = out.getvalue().splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in out.getvalue()
    words = " ".join(out.getvalue().split())
    for term in explain(plan.recipe, "decode"):
        start = " ".join(term.source.split()[:2])
        assert start[:30] in words


def test_the_table_of_sums_has_every_line_and_the_totals() -> None:
    plan = plan_of("ullage", NF4, DMS)
    out = StringIO()
    Console(file=out, width=250, color_system=None).print(sums_table(plan, None, wide=True))
    text = out.getvalue()
    for phase in PHASES:
        assert re.search(
            rf"{phase} +total +{re.escape(format_bytes(plan.phases[phase].total_bytes))}", text
        )
    count = sum(len(explain(plan.recipe, phase)) + 1 for phase in PHASES)
    assert len([line for line in text.splitlines() if line.strip()]) == count + 1
    assert "-" in next(x for x in text.splitlines() if "decode" in x and "quantization" in x)
