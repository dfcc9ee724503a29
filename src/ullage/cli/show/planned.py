"""A plan as people read it."""

from dataclasses import replace

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ullage import techniques
from ullage.planner import build_plan
from ullage.planner.engines import ENGINES
from ullage.planner.search import describe
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Plan
from ullage.units import format_bytes

_UNBOUNDED = 1 << 10  # columns: more than any table needs


def show_plan(console: Console, plan: Plan, calibration: Calibration | None) -> None:
    """Print `plan`: its phases, the verdict, the cliff, and what it would take otherwise."""
    recipe, work = plan.recipe, plan.recipe.workload
    console.print(
        f"{escape(recipe.model.name)} ({recipe.model.parameters / 1e6:,.1f}M parameters) on "
        f"{recipe.device.name}, budget {format_bytes(plan.budget_bytes)}"
    )
    console.print(
        f"{work.sequences} x ({work.prompt_tokens:,} prompt + {work.output_tokens:,} output "
        f"tokens), {describe(recipe)}"
    )
    console.print(_phase_table(console, plan))
    verdict = "[green]fits[/]" if plan.fits else "[red]does not fit[/]"
    spare = plan.budget_bytes - plan.peak_bytes
    console.print(
        f"Peak {format_bytes(plan.peak_bytes)}: {verdict}, "
        f"{format_bytes(abs(spare))} {'to spare' if spare >= 0 else 'too much'}."
    )
    for line in (
        *_context_lines(plan),
        *_latency_lines(plan),
        *_pool_lines(plan),
        *_cliff_lines(plan),
        *_attention_lines(plan, calibration),
        *_request_lines(plan),
        *_encoder_lines(plan),
        *_planned_only_lines(plan),
    ):
        console.print(line)


def _phase_table(console: Console, plan: Plan) -> Table:
    """With as much beside the sizes as there is room for."""
    roomy = console.options.update(max_width=_UNBOUNDED)
    for bar, logits in ((20, True), (0, True)):
        table = _phases(plan, bar, logits)
        if console.measure(table, options=roomy).maximum <= console.width:
            return table
    return _phases(plan, bar=0, logits=False)


def _phases(plan: Plan, bar: int, logits: bool) -> Table:
    """A bar of so many columns, and a column for logits, which are scratch too, or none."""
    scratch = ("scratch", "logits") if logits else ("scratch, logits",)
    table = Table("phase", box=None, pad_edge=False)
    for column in ("weights", "KV", *scratch, "runtime", "total", "of budget" if bar else "share"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, part in plan.phases.items():
        apart = (part.activation_bytes, part.logits_bytes)
        scratch_bytes = apart if logits else (sum(apart),)
        sizes = (part.weights_bytes, part.kv_bytes, *scratch_bytes, part.overhead_bytes)
        share = part.total_bytes / plan.budget_bytes
        texts = (format_bytes(size) for size in (*sizes, part.total_bytes))
        table.add_row(name, *texts, _bar(share, bar))
    return table


def _bar(share: float, width: int) -> str:
    filled = min(width, round(share * width))
    color = "green" if share <= 1 else "red"
    return f"[{color}]{'█' * filled}{'░' * (width - filled)}[/] {share:.0%}"


def _context_lines(plan: Plan) -> list[str]:
    recipe = plan.recipe
    if recipe.workload.context_tokens <= techniques.most_tokens(recipe):
        return []
    return [
        f"WARNING: {recipe.workload.context_tokens:,} tokens are beyond the model's own context of "
        f"{recipe.model.max_context_tokens:,}: engines refuse or misread them."
    ]


def _latency_lines(plan: Plan) -> list[str]:
    latency, work = plan.latency, plan.recipe.workload
    if latency is None:
        return []
    first, rate = latency.ttft_band_s, latency.tokens_per_s_band
    each = ""
    if work.sequences > 1:
        each = f", {_rate(latency.sequence_tokens_per_s)} for each of {work.sequences:,} sequences"
    return [
        f"Latency: first token of a prompt in about {latency.ttft_s:,.2f} s ({first.low:,.2f} to "
        f"{first.high:,.2f}), then about {_rate(latency.tokens_per_s)} tokens/s ({_rate(rate.low)} "
        f"to {_rate(rate.high)}){each}."
    ]


def _rate(tokens_per_s: float) -> str:
    """With a digit more where a whole number would say little."""
    return f"{tokens_per_s:,.{0 if tokens_per_s >= 10 else 1}f}"


def _pool_lines(plan: Plan) -> list[str]:
    """What a server's pool holds: requests beyond it wait."""
    share = plan.share
    if not ENGINES[plan.recipe.execution.engine].takes_share:
        return []
    return [
        f"Pool: {format_bytes(share.kv_pool_bytes)} of KV entries on each device, "
        f"{share.kv_pool_tokens:,} tokens, {share.max_concurrency:,.2f} sequences of this length; "
        "further ones wait."
    ]


def _encoder_lines(plan: Plan) -> list[str]:
    model, execution = plan.recipe.model, plan.recipe.execution
    if not model.encoder or ENGINES[execution.engine].takes_share:
        return []
    size = format_bytes(model.encoder_bytes(execution.dtype))
    return [f"Its encoder of pictures, {size}, is not counted: only text is read here."]


def _request_lines(plan: Plan) -> list[str]:
    """What a single request can take beside the plan."""
    engine = ENGINES[plan.recipe.execution.engine]
    return [
        f"Outside of this: {term.what}, up to {format_bytes(term.nbytes)} a request."
        for term in engine.worst_request_terms(plan.recipe)
    ]


def _planned_only_lines(plan: Plan) -> list[str]:
    lines = [
        f"{choice.name} is planned only: `ullage run` does not do it yet."
        for choice in plan.recipe.techniques
        if not techniques.create(choice).runs
    ]
    execution = plan.recipe.execution
    if (execution.engine, execution.attention) == ("ullage", "eager"):
        lines.append("eager is planned only: `ullage run` never builds the score matrix.")
    return lines


def _cliff_lines(plan: Plan) -> list[str]:
    cliff, work, model = plan.cliff, plan.recipe.workload, plan.recipe.model
    if cliff.max_model_len == 0:
        return ["Cliff: not even the shortest prompt fits."]
    beyond = ""
    if cliff.max_model_len is not None and cliff.max_model_len >= model.max_context_tokens:
        beyond = f", beyond the model's own context of {model.max_context_tokens:,}"
    return [
        f"Cliff: with {_count(work.sequences, 'sequence')} "
        f"{_first_to_fail('context', cliff.max_model_len, 'token')}{beyond}.",
        f"       At {work.context_tokens:,} tokens "
        f"{_first_to_fail('batch', cliff.max_num_seqs, 'sequence')}.",
        f"       Each token more holds {plan.kv_bytes_per_token:,} bytes of KV.",
    ]


def _first_to_fail(what: str, largest: int | None, noun: str) -> str:
    if largest is None:
        return f"no {what} fails"
    return f"the first {what} that fails is {_count(largest + 1, noun)}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _attention_lines(plan: Plan, calibration: Calibration | None) -> list[str]:
    """What the score matrix would do to the same request, read in one pass as transformers does.
    Servers have formats that it does not; KV entries in one of ours that it has not are then in the
    arithmetic's."""
    asked = plan.recipe.execution
    if asked.engine not in ("ullage", "transformers"):
        return []
    known = asked.kv_dtype in ENGINES["transformers"].kv_dtypes
    kv_dtype = asked.kv_dtype if known else asked.dtype
    lines: list[str] = []
    if calibration is not None and calibration.engine != "transformers":
        calibration = None  # what transformers takes was not measured
    chosen = tuple(
        choice
        for choice in plan.recipe.techniques
        if "transformers" in techniques.create(choice).engines
    )
    for attention in ("eager", "sdpa"):
        execution = replace(
            asked, engine="transformers", kv_dtype=kv_dtype, attention=attention, prefill_chunk=0
        )
        recipe = replace(plan.recipe, execution=execution, techniques=chosen)
        other = build_plan(recipe, plan.budget_bytes, calibration)
        prefill, largest = other.phases["prefill"], other.cliff.max_model_len
        fails = (
            "never fails" if largest is None else f"first fails at {_count(largest + 1, 'token')}"
        )
        lines.append(
            f"{'One pass, ' if not lines else '          '}{attention + ':':<6} prefill peaks at "
            f"{format_bytes(prefill.total_bytes)} ({format_bytes(prefill.activation_bytes)} of it "
            f"activations and scores), {fails}."
        )
    return lines
