"""A healthy start into a calibration: the planner's constants, corrected by what was measured."""

from typing import get_args

from ullage.doctor.diagnosis import Diagnosis
from ullage.doctor.fit import plan_of
from ullage.doctor.llamacpp import UNACCOUNTED
from ullage.doctor.vllm_facts import GRAPHS, NON_TORCH, PROFILE_PEAK
from ullage.errors import InputError
from ullage.planner.constants import Constants
from ullage.specs.calibration import Calibration
from ullage.specs.plan import Plan
from ullage.specs.workload import Engine
from ullage.units import GIB

# The constant that is added to a part as it is; the part's name among a diagnosis's parts, and in
# a plan's share. It takes the difference between the measured and the planned part.
_ADDED = (
    ("graph_bytes", GRAPHS, "graph_bytes"),
    ("fixed_activation_bytes", PROFILE_PEAK, "activation_bytes"),
)


def learn(diagnosis: Diagnosis) -> Calibration:
    """The calibration that a healthy start gives.

    Raises:
        InputError: the log is one of a failure, of an engine that is not planned, or without
            figures that the planner has a place for.
    """
    engine = diagnosis.engine
    if diagnosis.failed:
        raise InputError(
            "The log shows a failure: --learn takes a start that went well. "
            "Leave --learn out to see what failed."
        )
    if engine not in get_args(Engine):
        raise InputError(f"No calibration is taken of {engine}: the planner has no such engine.")
    constants = _outside(diagnosis) | _corrected(diagnosis, plan_of(diagnosis))
    if not constants:
        raise InputError(
            f"The log has no figure that the planner can take for {engine}. vLLM writes them with "
            "VLLM_LOGGING_LEVEL=DEBUG, llama.cpp in the table that it prints when it ends."
        )
    total = (diagnosis.total_bytes or 0) / GIB
    device = f"{total:.2f} GiB device" if total else "device of the log"
    versions = {engine: diagnosis.engine_version} if diagnosis.engine_version else {}
    return Calibration(device, engine, constants, versions)  # type: ignore[arg-type]


def _measured(diagnosis: Diagnosis, what: str) -> int:
    return sum(term.nbytes for term in diagnosis.parts if term.what == what)


def _outside(diagnosis: Diagnosis) -> dict[str, int]:
    """What the context and communication take, under the name that it has for the number of
    devices. Stages of a pipeline differ, so that one figure is none of them."""
    if diagnosis.engine == "llama.cpp":
        sizes = [term.nbytes for term in diagnosis.parts if term.what.startswith(UNACCOUNTED)]
        return {"runtime_bytes": max(sizes)} if sizes else {}
    size, run = _measured(diagnosis, NON_TORCH), diagnosis.run
    if size <= 0 or run.pipeline_parallel > 1:
        return {}
    if run.tensor_parallel == 1:
        return {"non_torch_bytes": size}
    return {"non_torch_tp_bytes": size, "non_torch_tp_slow_bytes": size}


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
