"""A frozen model that reads a text with an attention of the caller's, with gradients of its states:
what measuring and training share."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from ullage.errors import TechniqueError
from ullage.kv.attention import attention_modules
from ullage.techniques.dms.adapter import CAPPED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ullage-training"
HEAD_TOKENS = 512  # whose logits there are at once


@dataclass(frozen=True)
class LayerInput:
    """What attention of one text in layer `layer` is computed from: `hidden` [T, E] without a
    gradient, and from it `query` [Hq, T, D], `keys` and `values` [Hkv, T, D]."""

    layer: int
    hidden: torch.Tensor
    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    scale: float
    window: int | None  # of a sliding layer

    def attention(self) -> torch.Tensor:
        """As the model has it, [Hq, T, D]."""
        group = self.query.shape[0] // self.keys.shape[0]
        keys, values = (part.repeat_interleave(group, 0) for part in (self.keys, self.values))
        seen = None if self.window is None else _band(len(self.hidden), self.window, keys.device)
        return F.scaled_dot_product_attention(
            self.query[None],
            keys[None],
            values[None],
            attn_mask=seen,
            is_causal=seen is None,
            scale=self.scale,
        )[0]


Attention = Callable[[LayerInput], torch.Tensor]  # [Hq, T, D]


@contextmanager
def differentiable(model: "PreTrainedModel", attention: Attention) -> Iterator[None]:
    """`model` with `attention` in all layers, ready for gradients of its states and of none of its
    weights. A layer's states are computed once more on the way back, and what is kept of each until
    then is what attention is computed from and what it returns.

    Raises, when the model is called:
        TechniqueError: it caps its attention scores.
    """
    hidden: dict[int, torch.Tensor] = {}
    called = _called_by_transformers(attention, hidden)
    AttentionInterface.register(NAME, _of_module)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(NAME)
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
        for _, module in attention_modules(model):
            hook = module.register_forward_pre_hook(_noted_in(hidden), with_kwargs=True)
            undo.callback(hook.remove)
            module.ullage_training = called  # type: ignore[assignment]
            undo.callback(delattr, module, "ullage_training")
        embeddings = model.get_input_embeddings()
        undo.callback(embeddings.register_forward_hook(_with_gradient).remove)
        undo.callback(model.train, model.training)
        enable, disable = _checkpointing(model)
        undo.callback(disable)
        enable({"use_reentrant": False})
        model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.eval()
        with torch.enable_grad():
            yield


def last_hidden(model: "PreTrainedModel", ids: torch.Tensor) -> torch.Tensor:
    """Of the text `ids`, [T]: what the logits are computed from, [T, E]."""
    output = model.base_model(ids[None].to(model.device), use_cache=False)
    return output.last_hidden_state[0]  # type: ignore[no-any-return]


def _of_module(module: Any, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
    """What transformers keeps for good: it knows of no text and no model."""
    return module.ullage_training(module, *args, **kwargs)  # type: ignore[no-any-return]


def _called_by_transformers(
    attention: Attention, hidden: dict[int, torch.Tensor]
) -> Callable[..., tuple[torch.Tensor, None]]:
    def called(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, None]:
        if softcap is not None:
            raise TechniqueError(CAPPED)
        layer: Any = module.layer_idx
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = query[0], key[0], value[0]
        output = attention(LayerInput(layer, hidden[layer], *states, scale, sliding_window))
        return output[None].transpose(1, 2), None

    return called


def _noted_in(hidden: dict[int, torch.Tensor]) -> Callable[..., None]:
    def note(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        hidden[module.layer_idx] = states[0].detach()  # type: ignore[index]

    return note


def _checkpointing(model: "PreTrainedModel") -> tuple[Callable[..., None], Callable[[], None]]:
    """What turns it on and off, by the names of this version of transformers."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    on, off = (getattr(model, f"{name}_checkpointing_{what}") for what in ("enable", "disable"))
    return on, off


def _with_gradient(_: torch.nn.Module, args: tuple[Any, ...], states: torch.Tensor) -> torch.Tensor:
    return states.requires_grad_()


def _band(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [T, T]: each position sees the `window` newest up to itself."""
    position = torch.arange(tokens, device=device)
    age = position[:, None] - position[None, :]
    return (age >= 0) & (age < window)
