"""How far back each KV head of a model has to look: what its predictions lose where it does not.

That heads differ in this and that it can be measured once is DuoAttention's observation (arXiv
2410.10819), which learns whether a head has to look back; here it is how far, and nothing is
learned. Each text is read once, in full attention, and read back once: at some positions a head's
output is computed once more from each of some shorter windows and the first few tokens, and what it
then lacks, d, moves the predictions by a KL divergence of E[(g d)^2] / 2 nats to second order. g is
the gradient of the log-likelihood of tokens drawn from the predictions themselves, so that E[g g^T]
is their Fisher information.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface

from ullage.errors import TechniqueError
from ullage.specs.blocks import full_layer_numbers
from ullage.specs.families import spec_from_config
from ullage.techniques.dms.adapter import Adapter
from ullage.techniques.dms.fingerprint import fingerprint
from ullage.techniques.dms.settings import SINKS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "ullage-look-back"
WINDOWS = (64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288,
           16384, 24576, 32768)  # fmt: skip
EVERY_TOKENS = 16  # a position is looked at; all of the second half of a text
ROWS = 32  # positions at once
HEAD_TOKENS = 512  # whose logits there are at once


@dataclass
class Losses:
    """Sums over positions, [L, Hkv, J] in fp32, and how many positions there were."""

    windows: tuple[int, ...]
    layers: list[int]
    sums: torch.Tensor
    positions: int = 0


def measure(
    model: "PreTrainedModel", texts: Iterable[torch.Tensor], record: dict[str, Any]
) -> Adapter:
    """An adapter for `model`, from `texts`, [T] token ids each, all equally long.

    Raises:
        TechniqueError: the model has no layer that DMS acts on, it caps its attention scores, or
            the texts are shorter than twice the least window.
    """
    spec = spec_from_config(model.config.get_text_config().to_dict())
    layers = full_layer_numbers(spec)
    losses: Losses | None = None
    random = torch.Generator(model.device).manual_seed(0)
    for ids in texts:
        if losses is None:
            windows = tuple(size for size in WINDOWS if 2 * size <= len(ids))
            if not windows or not layers:
                raise TechniqueError(f"dms: there is nothing to measure in {len(ids)} tokens.")
            sums = torch.zeros(len(layers), spec.num_kv_heads, len(windows))
            losses = Losses(windows, layers, sums)
        with _watched(model, losses):
            _read_and_back(model, ids, random)
        losses.positions += len(_positions(len(ids)))
    if losses is None:
        raise TechniqueError("dms: there is no text to measure with.")
    mean = losses.sums / losses.positions
    return Adapter(losses.windows, mean.numpy(), spec.head_dim, fingerprint(model), record)


def _read_and_back(model: "PreTrainedModel", ids: torch.Tensor, random: torch.Generator) -> None:
    """The gradient of the log-likelihood of tokens drawn from the predictions after `ids`, [T]; the
    logits of some positions at a time."""
    hidden = model.base_model(ids[None].to(model.device), use_cache=False).last_hidden_state[0]
    leaf = hidden.detach().requires_grad_()
    for part in torch.split(leaf, HEAD_TOKENS):
        logits = model.get_output_embeddings()(part).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=random)[:, 0]
        torch.autograd.backward(F.cross_entropy(logits, drawn, reduction="sum"))
    torch.autograd.backward(hidden, leaf.grad)


@contextmanager
def _watched(model: "PreTrainedModel", losses: Losses) -> Iterator[None]:
    """`model` with attention that notes what shorter windows would lose, ready for gradients of its
    states and of none of its weights; a layer's states are computed once more on the way back, and
    what is kept of each until then is its queries, keys and values."""
    AttentionInterface.register(NAME, partial(_attention, losses))
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(NAME)
        for weight in model.parameters():
            undo.callback(weight.requires_grad_, weight.requires_grad)
            weight.requires_grad_(False)
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


def _checkpointing(model: "PreTrainedModel") -> tuple[Callable[..., None], Callable[[], None]]:
    """What turns it on and off, by the names of this version of transformers."""
    name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    on, off = (getattr(model, f"{name}_checkpointing_{what}") for what in ("enable", "disable"))
    return on, off


def _with_gradient(_: torch.nn.Module, args: tuple[Any, ...], states: torch.Tensor) -> torch.Tensor:
    return states.requires_grad_()


def _attention(
    losses: Losses,
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
    """Attention of one text, query [1, Hq, T, D]; one layer's on the way back notes its losses."""
    if softcap is not None:
        raise TechniqueError("dms: a model that caps its attention scores is not measured yet.")
    group = query.shape[1] // key.shape[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (key, value))
    band = None if sliding_window is None else _band(query.shape[2], sliding_window, query.device)
    output = F.scaled_dot_product_attention(
        query, keys, values, attn_mask=band, is_causal=band is None, scale=scaling
    )
    layer: Any = module.layer_idx
    if layer in losses.layers:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        states = query[0].detach(), key[0].detach(), value[0].detach()
        sums = losses.sums[losses.layers.index(layer)]
        output.register_hook(  # type: ignore[no-untyped-call]
            partial(_note, losses.windows, sums, states, scale)
        )
    return output.transpose(1, 2), None


def _band(tokens: int, window: int, device: torch.device) -> torch.Tensor:
    """Bool [T, T]: each position sees the `window` newest up to itself."""
    position = torch.arange(tokens, device=device)
    age = position[:, None] - position[None, :]
    return (age >= 0) & (age < window)


def _note(
    windows: tuple[int, ...],
    sums: torch.Tensor,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    gradient: torch.Tensor,
) -> None:
    """Add to `sums`, [Hkv, J], what the windows lose, by queries, keys and values, [H, T, D] each,
    and the gradient of the output, [1, Hq, T, D]."""
    query, keys, values = states
    heads = keys.shape[0]
    for at in torch.split(_positions(query.shape[1]), ROWS):
        lost = _lost(query[:, at], keys, values, at, scale, windows)  # [J, Hq, N, D]
        moved = (lost * gradient[0][:, at].float()).sum(-1)  # [J, Hq, N]
        by_head = moved.view(len(windows), heads, -1, len(at)).sum(2)  # a group moves together
        sums += by_head.square().sum(-1).T.cpu() / 2


def _positions(tokens: int) -> torch.Tensor:
    return torch.arange(tokens // 2, tokens, EVERY_TOKENS)


def _lost(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    at: torch.Tensor,
    scale: float,
    windows: tuple[int, ...],
) -> torch.Tensor:
    """What attention from each of J windows lacks of full attention, [J, Hq, N, D] in fp32, for
    queries [Hq, N, D] at the positions `at`, over keys and values [Hkv, T, D]."""
    heads, tokens, head_dim = keys.shape
    scores = query.float().reshape(heads, -1, head_dim) @ keys.float().transpose(1, 2)
    scores = scores.mul_(scale).view(*query.shape[:2], tokens)  # [Hq, N, T]
    entry = torch.arange(tokens, device=keys.device)
    age = at.to(keys.device)[:, None] - entry[None, :]  # [N, T]
    weights = scores.masked_fill_(age < 0, float("-inf")).softmax(-1)

    def seen(visible: torch.Tensor | None) -> torch.Tensor:
        shown = weights if visible is None else weights * visible
        summed = shown.view(heads, -1, tokens) @ values.float()
        return summed.view(query.shape) / shown.sum(-1, keepdim=True)

    full = seen(None)
    return torch.stack([seen((age < size) | (entry < SINKS)) - full for size in windows])
