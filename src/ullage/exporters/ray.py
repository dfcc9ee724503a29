"""Ray Serve: the YAML of an LLMConfig, whose engine is vLLM."""

import re
from typing import Any

from ullage.exporters import vllm
from ullage.exporters.shared import plans, text
from ullage.exporters.shared.options import Option, known
from ullage.exporters.shared.text import Noted
from ullage.specs.plan import Plan


def export(plan: Plan) -> str:
    """The application for ``serve run FILE``.

    Raises:
        InputError: something that vLLM does not have.
    """
    application = {
        "name": "llm",
        "route_prefix": "/",
        "import_path": "ray.serve.llm:build_openai_app",
        "args": {"llm_configs": [_config(plan)]},
    }
    version = f"LLMConfig of ray {known('ray').version}; engine_kwargs are vLLM's."
    return text.yaml([*vllm.notes(plan), version], {"applications": [application]})


def _config(plan: Plan) -> dict[str, Any]:
    model = plan.recipe.model
    config: dict[str, Any] = {
        "model_loading_config": {
            "model_id": Noted(text.writable(model.name, "model's name"), "what requests ask for"),
            "model_source": Noted(plans.weights_of(model).name, "hub id or folder"),
        },
        "engine_kwargs": {
            _keyword(option): Noted(True if option.value is None else option.value, option.why)
            for option in vllm.options(plan)
        },
        "deployment_config": {
            "num_replicas": Noted(1, f"{_devices(plan)} a replica, as planned"),
        },
    }
    for variable in vllm.environment(plan):
        config["runtime_env"] = {"env_vars": {variable.name: Noted(variable.value, variable.why)}}
    accelerator = _accelerator(plan.recipe.device.name)
    if accelerator is not None:
        config["accelerator_type"] = Noted(accelerator, "the device that was planned")
    return config


def _keyword(option: Option) -> str:
    return option.name.removeprefix("--").replace("-", "_")


def _devices(plan: Plan) -> str:
    execution = plan.recipe.execution
    count = execution.tensor_parallel * execution.pipeline_parallel
    return f"{count:,} device{'' if count == 1 else 's'}"


def _accelerator(device: str) -> str | None:
    """Ray's name of a device, if it has one: h100-80gb is its H100."""
    words = re.split(r"[\s-]+", device.upper())
    return next((word for word in words if word in known("ray").choices["accelerator_type"]), None)
