"""A healthy start into a calibration: the planner's constants, corrected by what was measured."""

from dataclasses import replace
from typing import get_args

from ullage.doctor.diagnosis import Diagnosis
from ullage.doctor.fit import plan_of
from ullage.doctor.llamacpp import UNACCOUNTED
from ullage.doctor.vllm_facts import GRAPHS, NON_TORCH, POOL, PROFILE_PEAK, WEIGHTS
from ullage.errors import InputError
from ullage.planner.constants import Constants
from ullage.planner.engines import ENGINES
from ullage.specs.calibration import Calibration
from ullage.specs.device import find_device
from ullage.specs.plan import Plan
from ullage.specs.workload import Engine

# The constant that is added to a part as it is; the part's name among a diagnosis's parts, and in
# a plan's share. It takes the difference between the measured and the planned part.
_ADDED = (
    ("graph_bytes", GRAPHS, "graph_bytes"),
    ("fixed_activation_bytes", PROFILE_PEAK, "activation_bytes"),
)


def learn(diagnosis: Diagnosis, device: str | None = None) -> Calibration:
    """The calibration that a healthy start on `device` gives. None is the card that the log names.

    Raises:
        InputError: the log is one of a failure, of an engine that is not planned, or without
            figures that the planner has a place for; or nobody names a device.
        UnknownDevice: `device` is neither of the catalog nor a size.
    """
    engine = diagnosis.engine
    if diagnosis.failed:
        raise InputError(
            "The log shows a failure: --learn takes a start that went well. "
            "Leave --learn out to see what failed."
        )
    if engine not in get_args(Engine):
        raise InputError(f"No calibration is taken of {engine}: the planner has no such engine.")
    named = diagnosis.device if device is None else find_device(device).name
    if not named:
        raise InputError(
            "The log names no device of the catalog: add --device, with the name that `ullage "
            "plan` will get."
        )
    plan = plan_of(replace(diagnosis, device=named))
    constants = _outside(diagnosis, plan) | _corrected(diagnosis, plan)
    if not constants:
        raise InputError(
            f"The log has no figure that the planner can take for {engine}. vLLM writes them with "
            "VLLM_LOGGING_LEVEL=DEBUG, and without it for models of the catalog; llama.cpp in the "
            "table that it prints when it ends."
        )
    versions = {engine: diagnosis.engine_version} if diagnosis.engine_version else {}
    return Calibration(named, engine, constants, versions)  # type: ignore[arg-type]


def _measured(diagnosis: Diagnosis, what: str) -> int:
    return sum(term.nbytes for term in diagnosis.parts if term.what == what)


def _outside(diagnosis: Diagnosis, plan: Plan | None) -> dict[str, int]:
    """What the context and communication take, under the name that it has for the number of
    devices. Stages of a pipeline differ, so that one figure is none of them."""
    if diagnosis.engine == "llama.cpp":
        sizes = [term.nbytes for term in diagnosis.parts if term.what.startswith(UNACCOUNTED)]
        return {"runtime_bytes": max(sizes)} if sizes else {}
    size, run = _measured(diagnosis, NON_TORCH) or _remainder(diagnosis, plan), diagnosis.run
    if size <= 0 or run.pipeline_parallel > 1:
        return {}
    if run.tensor_parallel == 1:
        return {"non_torch_bytes": size}
    return {"non_torch_tp_bytes": size, "non_torch_tp_slow_bytes": size}


def _remainder(diagnosis: Diagnosis, plan: Plan | None) -> int:
    """Bytes of vLLM's share of the device that are neither in the KV pool nor accounted for. A
    start that does not log its profile has no other trace of the context: its peak is the plan's.
    """
    weights, pool = _measured(diagnosis, WEIGHTS), _measured(diagnosis, POOL)
    if plan is None or diagnosis.engine != "vllm" or not weights or not pool:
        return 0
    peak = _measured(diagnosis, PROFILE_PEAK) or plan.share.activation_bytes
    graphs = _measured(diagnosis, GRAPHS) or plan.share.graph_bytes
    inside = graphs if Constants(plan.recipe)["graphs_in_budget"].value else 0
    return ENGINES["vllm"].limit_bytes(plan.recipe) - weights - peak - inside - pool


def _corrected(diagnosis: Diagnosis, plan: Plan | None) -> dict[str, int]:
    if plan is None:
        return {}
    constants, learned = Constants(plan.recipe), {}
    for key, what, field in _ADDED:
        size = _measured(diagnosis, what)
        if size <= 0 or key not in constants:
            continue
        corrected = int(constants[key].value) + size - getattr(plan.share, field)
        if corrected > 0:
            learned[key] = corrected
    return learned
