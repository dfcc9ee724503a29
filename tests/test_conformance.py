"""What every technique promises. A new folder under techniques/ is tested by being there."""

import json
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlparse

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ullage import ModelSpec, build_plan, resolve, techniques
from ullage.errors import TechniqueError
from ullage.kv import attention
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.fingerprint import fingerprint
from ullage.kv.pool import KVPool
from ullage.planner.memory import phase_footprints
from ullage.runtime import engine
from ullage.runtime.load import TORCH_DTYPES, load_model, load_tokenizer
from ullage.specs.blocks import sequence_blocks
from ullage.specs.device import Device
from ullage.specs.families import RUNNING
from ullage.specs.footprint import Footprint
from ullage.specs.plan import Recipe, TechniqueChoice
from ullage.specs.workload import PHASES, Engine, Execution, Workload
from ullage.techniques import Technique, choice_of, create, parse
from ullage.techniques.dms.adapter import DECIDED_TOKENS, LEARNED, Adapter
from ullage.techniques.larimar.adapter import Adapter as LatentAdapter
from ullage.techniques.larimar.fact import Fact
from ullage.techniques.larimar.ledger import Ledger, Who
from ullage.techniques.quantization.linear import tensor_bytes
from ullage.units import GIB

TinyModel = Callable[..., tuple[Any, ModelSpec]]
TinySpec = Callable[..., ModelSpec]

FP32 = Execution(dtype="fp32", kv_dtype="fp32")
IDS = torch.randint(6, 64, (2, 24), generator=torch.Generator().manual_seed(1))
SHORT = 9  # tokens of the second sequence, where it is shorter


FOLDER = TemporaryDirectory()  # until the process ends
ADAPTER = Path(FOLDER.name) / "tiny.safetensors"
LATENTS = Path(FOLDER.name) / "latents.safetensors"


def save_adapters(fingerprint: str) -> None:
    """Of the tiny llama's shape: of DMS, as if its heads had to look back unlike far and two
    predictors were learned, and of Larimar, at random."""
    random = torch.Generator().manual_seed(1)
    loss = torch.rand(2, 2, 3, generator=random).sort(descending=True).values.numpy()
    learned = {name: torch.randn(2, 2, 32, generator=random).numpy() for name in LEARNED}
    captured = torch.linspace(0.5, 1, DECIDED_TOKENS).expand(2, 2, -1).numpy()
    Adapter((2, 4, 8), loss, captured, 8, fingerprint, {}, learned).save(ADAPTER)
    mean, basis = (torch.randn(*of, 2, 2, 8, generator=random).numpy() for of in ((2,), (8, 2)))
    scale = torch.ones(2, 2).numpy()
    LatentAdapter(mean, scale, basis / 8, fingerprint, {}).save(LATENTS)


save_adapters("")  # settings name a file that is there


LEDGER = Path(FOLDER.name) / "facts.db"
TOKENIZER = Path(FOLDER.name) / "tokenizer"


def save_ledger() -> None:
    """Facts of words that each of IDS begins with, whole or short: a gate sees what is read."""
    TOKENIZER.mkdir()
    with Ledger(LEDGER, create=True) as ledger:
        facts = [
            Fact.make(prompt=f"w{word} w9", answer="w7 w8", subject=f"w{word}")
            for word in (IDS[0, 3].item(), IDS[1, 0].item(), IDS[1, -SHORT].item())
        ]
        ledger.add(facts, Who("a test"))


save_ledger()


@pytest.fixture(autouse=True, scope="module")
def files_of_the_tiny_llama(tiny_model: TinyModel, model_folder: Callable[..., Path]) -> None:
    save_adapters(fingerprint(tiny_model("llama")[0]))
    load_tokenizer(model_folder("llama")).save_pretrained(TOKENIZER)


# What acts on texts as short as these; elsewhere the defaults do.
SMALL: dict[str, list[dict[str, Any]]] = {
    "dms": [
        {"kept": 0.25, "window": 4},
        {"kept": 0.25, "window": 4, "adapter": str(ADAPTER)},
    ],
    "larimar": [
        {"ledger": str(LEDGER), "tokenizer": str(TOKENIZER), "held": 1} | readout
        for readout in ({}, {"readout": "latent", "adapter": str(LATENTS)})
    ],
    "camelot": [{"slots": 8, "segment": 4}, {"slots": 5, "segment": 3, "recent": 2, "top_k": 2}],
}


def settings_of(name: str) -> Iterator[Technique]:
    """The technique with small settings, and with every choice of its Literal and bool ones."""
    for settings in SMALL.get(name, [{}]):
        yield from choices_of(create(TechniqueChoice(name, settings)))


def choices_of(default: Technique) -> Iterator[Technique]:
    kinds = get_type_hints(type(default))
    choices = [
        get_args(kinds[field.name])
        if get_origin(kinds[field.name]) is Literal
        else (False, True)
        if kinds[field.name] is bool
        else (getattr(default, field.name),)
        for field in fields(default)
    ]
    for values in product(*choices):
        settings = dict(zip((field.name for field in fields(default)), values, strict=True))
        with suppress(TechniqueError):  # choices that exclude each other
            yield create(TechniqueChoice(default.name, settings))


NAMES = techniques.names()
EVERY = [technique for name in NAMES for technique in settings_of(name)]
ACTIVE = [technique for technique in EVERY if technique != technique.neutral()]

PLANNED_ONLY = {technique.name for technique in EVERY if not technique.runs}


def label(technique: Technique) -> str:
    """Without the folder, which is another one each time."""
    return str(technique).replace(FOLDER.name, "")


every_name = pytest.mark.parametrize("name", NAMES)
every_setting = pytest.mark.parametrize("technique", EVERY, ids=label)
every_active = pytest.mark.parametrize("technique", ACTIVE, ids=label)


def supported_families(technique: Technique, tiny_spec: TinySpec) -> list[str]:
    return [family for family in RUNNING if technique.unsupported(tiny_spec(family)) is None]


def skip_unless_it_runs(name: str) -> None:
    if name in PLANNED_ONLY:
        pytest.skip(f"{name} is planned only: there is nothing to attach")


def recipe(
    spec: ModelSpec, technique: Technique, work: Workload, execution: Execution, *more: Technique
) -> Recipe:
    device = Device("cpu", "cpu", 64 * GIB)
    return Recipe(spec, device, work, execution, tuple(map(choice_of, (technique, *more))))


def cache_for(spec: ModelSpec, dtype: torch.dtype) -> PagedCache:
    return PagedCache(spec, KVPool(2 * sequence_blocks(spec, 64), spec.head_dim, dtype))


def logits(
    model: Any,
    spec: ModelSpec,
    ids: torch.Tensor,
    mask: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits [B, N, V] as the engine gets them: prompt in two chunks, over a PagedCache whose
    entries are in `dtype`."""
    attention.register()
    model.set_attn_implementation(attention.NAME)
    cache, parts = cache_for(spec, dtype), []
    mask = torch.ones_like(ids) if mask is None else mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        for start in range(0, ids.shape[1], 16):
            end = start + 16
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                **cache_argument(model, cache),
            )
            parts.append(output.logits)
    return torch.cat(parts, dim=1)


@every_name
def test_its_paper_is_a_url_and_it_says_what_it_acts_on(name: str) -> None:
    technique = create(TechniqueChoice(name, {}))
    paper = urlparse(technique.paper)
    assert (paper.scheme, bool(paper.netloc), len(paper.path) > 1) == ("https", True, True)
    assert technique.acts_on in {"weights", "kv", "context", "facts"}
    assert technique.name == name


@every_name
def test_its_neutral_setting_is_one_of_its_own(name: str) -> None:
    neutral = create(TechniqueChoice(name, {})).neutral()
    assert neutral.name == name
    assert create(choice_of(neutral)) == neutral


@every_setting
@given(
    st.integers(1, 3000),
    st.integers(0, 700),
    st.integers(1, 8),
    st.sampled_from(["fp32", "bf16", "int8"]),
    st.sampled_from([0, 32, 512]),
)
def test_planned_bytes_never_fall_as_tokens_grow(
    tiny_spec: TinySpec,
    technique: Technique,
    tokens: int,
    more: int,
    sequences: int,
    kv_dtype: str,
    chunk: int,
) -> None:
    execution = Execution(dtype="fp32", kv_dtype=kv_dtype, prefill_chunk=chunk)

    def planned(prompt_tokens: int) -> dict[Any, Footprint]:
        work = Workload(prompt_tokens, 10, sequences)
        return phase_footprints(recipe(tiny_spec("llama"), technique, work, execution))

    before, after = planned(tokens), planned(tokens + more)
    for phase in PHASES:
        assert after[phase].total_bytes >= before[phase].total_bytes
        assert min(asdict(before[phase]).values()) >= 0


@every_name
def test_its_neutral_setting_plans_nothing(name: str, tiny_spec: TinySpec) -> None:
    neutral = create(TechniqueChoice(name, {})).neutral()
    with_it = recipe(tiny_spec("llama"), neutral, Workload(100, 10), FP32)
    without = Recipe(with_it.model, with_it.device, with_it.workload, FP32)
    assert phase_footprints(with_it) == phase_footprints(without)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@every_active
def test_planned_weights_are_the_live_bytes(
    tiny_model: TinyModel, tiny_spec: TinySpec, technique: Technique, dtype: str
) -> None:
    if technique.acts_on != "weights":
        pytest.skip("does not act on weights")
    for family in supported_families(technique, tiny_spec):
        model, spec = tiny_model(family)
        model.to(torch.float32 if dtype == "fp32" else torch.bfloat16)
        execution = Execution(dtype=dtype, kv_dtype=dtype)
        planned = phase_footprints(recipe(spec, technique, Workload(10, 10), execution))
        with technique.attach(model):
            live_bytes = sum(tensor_bytes(weight) for weight in model.parameters())
        for phase in PHASES:
            assert planned[phase].weights_bytes == pytest.approx(live_bytes, rel=0.005), family


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
@every_active
def test_planned_kv_entries_are_the_live_bytes(
    tiny_spec: TinySpec, technique: Technique, kv_dtype: str
) -> None:
    skip_unless_it_runs(technique.name)
    if technique.acts_on == "facts":
        pytest.skip("acts on no sequence's entries")
    spec = tiny_spec("llama")
    for tokens in (3, 24, 60):
        execution = replace(FP32, kv_dtype=kv_dtype)
        made = recipe(spec, technique, Workload(tokens - 1, 1), execution)
        planned_bytes = phase_footprints(made)["decode"].kv_bytes
        pool = KVPool(sequence_blocks(spec, 64), spec.head_dim, TORCH_DTYPES[kv_dtype])
        with closing(PagedCache(spec, pool, technique.rows(spec)).open(tokens)):
            state_bytes = planned_bytes - pool.taken_bytes
            # what scores entries takes a few KB, however few there are
            assert 0 <= state_bytes < 0.2 * planned_bytes + 3072
            assert pool.taken_bytes == techniques.sequence_blocks(made, tokens) * pool.block_bytes


@every_name
def test_its_neutral_setting_changes_no_bit(name: str, tiny_model: TinyModel) -> None:
    skip_unless_it_runs(name)
    model, spec = tiny_model("llama")
    before = logits(model, spec, IDS)
    with create(TechniqueChoice(name, {})).neutral().attach(model):
        inside = logits(model, spec, IDS)
    assert torch.equal(inside, before)


def parts_of(model: torch.nn.Module) -> dict[str, Any]:
    """Everything of a model that a technique could leave changed, by identity; references keep the
    identities alive."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
    return {
        "modules": list(model.named_modules()),
        "parameters": list(model.named_parameters()),
        "buffers": list(model.named_buffers()),
        "hooks": [
            (name, hook, list(getattr(module, hook)))
            for name, module in model.named_modules()
            for hook in hooks
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "config": model.config.to_dict(),
        "training": model.training,
    }


def assert_untouched(before: dict[str, Any], after: dict[str, Any]) -> None:
    for kind in ("modules", "parameters", "buffers"):
        assert [name for name, _ in before[kind]] == [name for name, _ in after[kind]]
        pairs = zip(before[kind], after[kind], strict=True)
        assert all(one is other for (_, one), (_, other) in pairs), kind
    for kind in ("hooks", "attributes", "config", "training"):
        assert before[kind] == after[kind], kind


@pytest.mark.parametrize("crash", [False, True])
@every_setting
def test_the_model_is_bit_exact_afterwards(
    tiny_model: TinyModel, technique: Technique, crash: bool
) -> None:
    skip_unless_it_runs(technique.name)
    model, spec = tiny_model("llama")
    logits_before, before = logits(model, spec, IDS), parts_of(model)
    weights = [weight.clone() for weight in model.parameters()]
    try:
        with technique.attach(model):
            logits(model, spec, IDS)
            if crash:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        pass
    assert_untouched(before, parts_of(model))
    assert all(map(torch.equal, model.parameters(), weights))
    assert torch.equal(logits(model, spec, IDS), logits_before)


@every_active
def test_weights_are_restored_when_attaching_fails_midway(
    tiny_model: TinyModel, technique: Technique, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when memory ends while a later layer is converted."""
    skip_unless_it_runs(technique.name)
    model, _ = tiny_model("llama")
    before = parts_of(model)
    untouched, calls = torch.nn.Module.__setattr__, iter(range(10))

    def fail_late(self: torch.nn.Module, name: str, value: Any) -> None:
        if isinstance(value, torch.nn.Module) and next(calls, None) == 3:
            raise MemoryError
        untouched(self, name, value)

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "__setattr__", fail_late)
        try:
            with technique.attach(model):
                pass
        except MemoryError:
            pass
    assert_untouched(before, parts_of(model))


@every_active
def test_it_changes_the_model_while_it_is_attached(
    tiny_model: TinyModel, technique: Technique
) -> None:
    """Else the promises of restoring would say nothing."""
    skip_unless_it_runs(technique.name)
    model, spec = tiny_model("llama")
    before = logits(model, spec, IDS)
    with technique.attach(model):
        inside = logits(model, spec, IDS)
    assert not torch.equal(inside, before)
    assert torch.isfinite(inside).all()


@every_active
def test_loading_it_is_attaching_it(
    model_folder: Callable[..., Path], tiny_model: TinyModel, technique: Technique
) -> None:
    """What `ullage run` does: as the weights are read, or once they are."""
    folder = model_folder("llama")
    plan = build_plan(recipe(resolve(str(folder)), technique, Workload(24, 1), FP32))
    if not technique.runs:
        with pytest.raises(TechniqueError):
            load_model(plan, folder, load_tokenizer(folder))
        return
    loaded = load_model(plan, folder, load_tokenizer(folder))
    model, spec = tiny_model("llama")
    with closing(loaded), technique.attach(model):
        assert torch.equal(logits(loaded.model, spec, IDS), logits(model, spec, IDS))


@pytest.mark.parametrize("kv_dtype", ["fp32", "int8"])
@pytest.mark.parametrize(
    ("weights", "entries"),
    [
        (weights, entries)
        for weights, entries in product(ACTIVE, ACTIVE)
        if weights.runs and entries.runs
        if weights.acts_on == "weights" and entries.acts_on != "weights"
    ],
    ids=label,
)
def test_it_goes_with_what_acts_on_something_else(
    model_folder: Callable[..., Path],
    tiny_model: TinyModel,
    weights: Technique,
    entries: Technique,
    kv_dtype: str,
) -> None:
    """Loaded together they are what one is attached inside the other; and the engine runs them."""
    folder, execution = model_folder("llama"), replace(FP32, kv_dtype=kv_dtype)
    tokenizer, dtype = load_tokenizer(folder), TORCH_DTYPES[kv_dtype]
    spec = resolve(str(folder))
    plan = build_plan(recipe(spec, weights, Workload(24, 6), execution, entries))
    model, _ = tiny_model("llama")
    with closing(load_model(plan, folder, tokenizer)) as loaded:
        with weights.attach(model):
            dense = logits(model, spec, IDS, dtype=dtype)
            with entries.attach(model):
                both = logits(model, spec, IDS, dtype=dtype)
        assert torch.equal(logits(loaded.model, spec, IDS, dtype=dtype), both)
        assert not torch.equal(both, dense)
        ran = engine.Engine(loaded.without_end(), plan)
        assert len(list(ran.generate(engine.Request(IDS[0].tolist(), 6)))) == 6
        assert ran.pool.taken_bytes == 0


@every_active
def test_two_runs_in_a_row_are_two_fresh_runs(tiny_model: TinyModel, technique: Technique) -> None:
    skip_unless_it_runs(technique.name)
    model, spec = tiny_model("llama")
    with technique.attach(model):
        together = [logits(model, spec, ids[None]) for ids in IDS]
    for ids, expected in zip(IDS, together, strict=True):
        fresh, _ = tiny_model("llama")
        with technique.attach(fresh):
            assert torch.equal(logits(fresh, spec, ids[None]), expected)


@every_active
def test_it_can_be_attached_again(tiny_model: TinyModel, technique: Technique) -> None:
    skip_unless_it_runs(technique.name)
    model, spec = tiny_model("llama")
    seen = []
    for _ in range(2):
        with technique.attach(model):
            seen.append(logits(model, spec, IDS))
    assert torch.equal(*seen)


@pytest.mark.parametrize("side", ["left", "right"])
@every_setting
def test_a_batch_of_two_is_two_singles(
    tiny_model: TinyModel, technique: Technique, side: str
) -> None:
    skip_unless_it_runs(technique.name)
    model, spec = tiny_model("llama")
    real = slice(-SHORT, None) if side == "left" else slice(SHORT)
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    mask[1] = 0
    mask[1, real] = 1
    ids[mask == 0] = 0
    with technique.attach(model):
        long = logits(model, spec, ids[:1])
        short = logits(model, spec, ids[1:, real])
        batch = logits(model, spec, ids, mask)
    torch.testing.assert_close(batch[:1], long, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(batch[1:, real], short, atol=1e-4, rtol=1e-4)


@every_setting
def test_settings_survive_json(technique: Technique) -> None:
    data = json.loads(json.dumps(asdict(choice_of(technique))))
    assert create(TechniqueChoice(**data)) == technique


@every_setting
def test_settings_can_be_typed(technique: Technique) -> None:
    settings = ",".join(f"{key}={value}" for key, value in asdict(technique).items())
    assert parse(f"{technique.name}:{settings}") == technique


@every_name
def test_a_bare_name_has_the_default_settings(name: str) -> None:
    assert parse(name) == create(TechniqueChoice(name, {}))


@every_name
def test_what_is_planned_only_says_so(name: str, tiny_model: TinyModel) -> None:
    if name not in PLANNED_ONLY:
        pytest.skip(f"{name} runs")
    model, _ = tiny_model("llama")
    for technique in settings_of(name):
        with pytest.raises(TechniqueError, match="can be planned, and is not run yet"):
            technique.attach(model)


@every_active
@pytest.mark.parametrize("engine", ["ullage", "transformers"])
def test_another_engine_is_our_error(
    tiny_spec: TinySpec, technique: Technique, engine: Engine
) -> None:
    execution = Execution(engine=engine)
    made = recipe(tiny_spec("llama"), technique, Workload(10, 10), execution)
    if engine in technique.engines:
        assert build_plan(made).recipe == made
        return
    with pytest.raises(TechniqueError, match=f"{technique.name} is a technique of ullage"):
        build_plan(made)


@every_name
@pytest.mark.parametrize("settings", ["nonsense=1", "=", "=1"])
def test_an_unknown_setting_is_our_error(name: str, settings: str) -> None:
    with pytest.raises(TechniqueError, match=f"{name} has no setting"):
        parse(f"{name}:{settings}")


@every_name
def test_an_unknown_setting_in_a_plan_is_our_error(name: str) -> None:
    with pytest.raises(TechniqueError, match="no setting 'nonsense'"):
        create(TechniqueChoice(name, {"nonsense": 1}))


@every_name
def test_a_value_that_cannot_be_is_our_error(name: str) -> None:
    default = create(TechniqueChoice(name, {}))
    for field in fields(default):
        with pytest.raises(TechniqueError, match=name):
            parse(f"{name}:{field.name}=surprise!")


@pytest.mark.parametrize("text", ["quantisation", "", "none", "quantization2:scheme=int8"])
def test_an_unknown_technique_is_our_error(text: str) -> None:
    with pytest.raises(TechniqueError, match="No technique is called"):
        parse(text)


def test_a_near_miss_is_pointed_out() -> None:
    with pytest.raises(TechniqueError, match="Did you mean quantization"):
        parse("quantisation")


@every_active
def test_an_unsupported_model_is_our_error(
    tiny_spec: TinySpec, tiny_model: TinyModel, technique: Technique
) -> None:
    families = set(RUNNING) - set(supported_families(technique, tiny_spec))
    for family in families:
        made = recipe(tiny_spec(family), technique, Workload(10, 10), FP32)
        with pytest.raises(TechniqueError, match=f"{technique.name} cannot act on"):
            build_plan(made)
        model, _ = tiny_model(family)
        with pytest.raises(TechniqueError), technique.attach(model):
            pass


@every_name
def test_its_neutral_setting_supports_every_family(name: str, tiny_spec: TinySpec) -> None:
    neutral = create(TechniqueChoice(name, {})).neutral()
    assert supported_families(neutral, tiny_spec) == list(RUNNING)


def test_quantization_does_not_act_on_gpt2(tiny_spec: TinySpec) -> None:
    for technique in settings_of("quantization"):
        reason = technique.unsupported(tiny_spec("gpt2"))
        assert (reason is None) == (technique == technique.neutral())
