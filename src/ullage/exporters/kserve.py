"""KServe: an LLMInferenceService, whose engine is vLLM."""

import re
from typing import Any

from ullage.errors import InputError
from ullage.exporters import vllm
from ullage.exporters.shared import plans, text
from ullage.exporters.shared.options import known
from ullage.exporters.shared.text import Noted
from ullage.specs.plan import Plan

_GPUS = {"cuda": "nvidia.com/gpu", "rocm": "amd.com/gpu"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(?:/[\w.-]+)?", re.ASCII)
_LONGEST_NAME = 53  # of a Kubernetes object, with room for what the controller adds


def export(plan: Plan) -> str:
    """The manifest for ``kubectl apply -f FILE``.

    Raises:
        InputError: something that vLLM does not have, or weights that no cluster can reach.
    """
    model, tensor = plan.recipe.model, plan.recipe.execution.tensor_parallel
    spec: dict[str, Any] = {
        "model": {
            "uri": Noted(_uri(plan), "where the weights are"),
            "name": Noted(_served_name(model.name), "what requests ask for"),
        },
        "replicas": 1,
        "router": {"route": {}, "gateway": {}},
        "template": {"containers": [_container(plan)]},
    }
    if tensor > 1:
        spec["parallelism"] = {"tensor": Noted(tensor, "GPUs that share each layer")}
    manifest = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "LLMInferenceService",
        "metadata": {"name": _object_name(model.name)},
        "spec": spec,
    }
    notes = [*vllm.notes(plan), f"LLMInferenceService of kserve {known('kserve').version}."]
    if plan.recipe.device.kind not in _GPUS:
        notes.append("KServe's own image is for GPUs: give the container main one for CPUs.")
    return text.yaml(notes, manifest)


def _container(plan: Plan) -> dict[str, Any]:
    """What the controller's own template has not: more arguments and the GPUs. It adds the tensor
    parallel size itself."""
    execution = plan.recipe.execution
    options = [
        option
        for option in vllm.options(plan)
        if option.name not in ("--tensor-parallel-size", "--revision")
    ]
    variables = vllm.environment(plan)
    why = "\n".join(f"{option.name}: {option.why}" for option in (*options, *variables))
    values = {"VLLM_ADDITIONAL_ARGS": text.flags(options)}
    values.update((variable.name, str(variable.value)) for variable in variables)
    environment = [{"name": name, "value": value} for name, value in values.items()]
    container: dict[str, Any] = {"name": "main", "env": Noted(environment, why)}
    gpu = _GPUS.get(plan.recipe.device.kind)
    if gpu is not None:
        count = str(execution.tensor_parallel * execution.pipeline_parallel)
        container["resources"] = {"limits": {gpu: Noted(count, "as planned")}}
    return container


def _uri(plan: Plan) -> str:
    weights = plans.weights_of(plan.recipe.model)
    reachable = "/" in weights.name or weights.unknown
    if not reachable or not _HUB_ID.fullmatch(weights.name):
        raise InputError(
            f"A cluster cannot read {weights.name!r}: plan a hub id, or copy the weights to a "
            "volume and write its pvc:// address into an exported manifest."
        )
    return f"hf://{weights.name}" + (f":{weights.revision}" if weights.revision else "")


def _served_name(name: str) -> str:
    """`name` where it is plain: the controller writes it into a shell script as it stands."""
    return name if _HUB_ID.fullmatch(name) else _object_name(name)


def _object_name(name: str) -> str:
    """`name` as Kubernetes takes it: lower-case letters, digits and hyphens."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    named = plain if plain[:1].isalpha() else f"model-{plain}"
    return named[:_LONGEST_NAME].strip("-")
