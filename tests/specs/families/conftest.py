"""Models of transformers on the meta device: shapes without memory."""

import copy
from collections.abc import Callable
from typing import Any

import pytest


def _hf_model(config: dict[str, Any]) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.mistral4.modeling_mistral4 import Mistral4ForCausalLM

    config = {"pad_token_id": None, **copy.deepcopy(config)}
    hf_config = AutoConfig.for_model(config.pop("model_type"), **config)
    with torch.device("meta"):
        if hf_config.model_type == "mistral4":  # which AutoModel does not know
            return Mistral4ForCausalLM(hf_config)
        if hasattr(hf_config, "vision_config"):
            return AutoModelForImageTextToText.from_config(hf_config)
        return AutoModelForCausalLM.from_config(hf_config)


@pytest.fixture(scope="session")
def hf_model() -> Callable[[dict[str, Any]], Any]:
    """`hf_model(config)`: the model that transformers builds from a config."""
    return _hf_model


@pytest.fixture(scope="session")
def hf_shapes() -> Callable[[Any], dict[str, tuple[int, ...]]]:
    """`hf_shapes(model)`: the tensors of its checkpoint, by the names that transformers saves."""

    def shapes(model: Any) -> dict[str, tuple[int, ...]]:
        from transformers.core_model_loading import revert_weight_conversion

        saved = revert_weight_conversion(model, model.state_dict())
        return {name: tuple(weight.shape) for name, weight in saved.items()}

    return shapes
