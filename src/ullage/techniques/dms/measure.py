"""How far back each KV head of a model has to look: what its attention loses where it does not.

No training: each text is read once, in full attention, and at some positions what a head adds to
the residual stream is computed once more from a shorter window and the first few tokens. That heads
differ in this and that it can be measured once is DuoAttention's observation (arXiv 2410.10819),
which asks whether a head has to look back; here it is how far.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
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
_OUTPUTS = ("o_proj", "dense", "c_proj", "out_proj")  # names that families give it


@dataclass
class Losses:
    """Sums over positions, [L, Hkv, J] in fp32, and how many positions there were."""

    windows: tuple[int, ...]
    sums: torch.Tensor
    positions: int = 0
    residuals: dict[int, torch.Tensor] = field(default_factory=dict)  # of a layer, [T, hidden]


@torch.inference_mode()
def measure(
    model: "PreTrainedModel", texts: Iterable[torch.Tensor], record: dict[str, Any]
) -> Adapter:
    """An adapter for `model`, from `texts`, [T] token ids each, all equally long.

    Raises:
        TechniqueError: the model has no layer that DMS acts on, its attention is not ours to
            replace, or the texts are shorter than twice the least window.
    """
    spec = spec_from_config(model.config.get_text_config().to_dict())
    layers = full_layer_numbers(spec)
    losses: Losses | None = None
    for ids in texts:
        if losses is None:
            windows = tuple(size for size in WINDOWS if 2 * size <= len(ids))
            if not windows or not layers:
                raise TechniqueError(f"dms: there is nothing to measure in {len(ids)} tokens.")
            losses = Losses(windows, torch.zeros(len(layers), spec.num_kv_heads, len(windows)))
        with _watched(model, losses, layers):
            model.base_model(ids[None].to(model.device), use_cache=False)
        losses.positions += len(_positions(len(ids)))
    if losses is None:
        raise TechniqueError("dms: there is no text to measure with.")
    mean = losses.sums / losses.positions
    return Adapter(losses.windows, mean.numpy(), spec.head_dim, fingerprint(model), record)


@contextmanager
def _watched(model: "PreTrainedModel", losses: Losses, layers: list[int]) -> Iterator[None]:
    """`model` with attention that notes what shorter windows would lose in `layers`."""
    AttentionInterface.register(NAME, partial(_attention, losses, layers))
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    with ExitStack() as undo:
        undo.callback(model.set_attn_implementation, before)
        model.set_attn_implementation(NAME)
        for name, module in model.named_modules():
            if name.endswith("attn") and getattr(module, "layer_idx", None) in layers:
                layer = model.get_submodule(name.rpartition(".")[0])
                note = partial(_note_residual, losses, module.layer_idx)
                undo.callback(layer.register_forward_pre_hook(note, with_kwargs=True).remove)
        yield
    losses.residuals.clear()


def _note_residual(
    losses: Losses, layer: int, _: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    losses.residuals[layer] = (args[0] if args else kwargs["hidden_states"])[0]


def _attention(
    losses: Losses,
    layers: list[int],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Full attention of one text, query [1, Hq, T, D]."""
    group = query.shape[1] // key.shape[1]
    keys, values = (part.repeat_interleave(group, dim=1) for part in (key, value))
    output = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling)
    number: Any = module.layer_idx
    if number in layers:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        here = losses.sums[layers.index(number)]
        residual = losses.residuals.pop(number)
        for at in torch.split(_positions(query.shape[2]), ROWS):
            lost = _lost(query[0][:, at], key[0], value[0], at, scale, losses.windows)
            here += _added(module, lost, key.shape[1], residual[at]).cpu()
    return output.transpose(1, 2), None


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


def _added(
    module: torch.nn.Module, lost: torch.Tensor, heads: int, residual: torch.Tensor
) -> torch.Tensor:
    """Squared length of `lost`, [J, Hq, N, D], behind the output projection, of the group of each
    of `heads` KV heads, over that of the residual stream [N, hidden], summed over positions:
    [Hkv, J]."""
    count, query_heads, positions, _ = lost.shape
    project = _output(module)
    squares = []
    for head in range(heads):
        alone = torch.zeros_like(lost)
        group = slice(head * query_heads // heads, (head + 1) * query_heads // heads)
        alone[:, group] = lost[:, group]
        added = project(alone.transpose(1, 2).reshape(count, positions, -1).to(residual.dtype))
        squares.append(added.float().square().sum(-1))  # [J, N]
    shares = torch.stack(squares) / residual.float().square().sum(-1)  # [Hkv, J, N]
    return shares.sum(-1)


def _output(module: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """The output projection without its bias."""
    found = next((getattr(module, name) for name in _OUTPUTS if hasattr(module, name)), None)
    if found is None:
        raise TechniqueError(f"dms: {type(module).__name__} has no output that we know.")
    return lambda states: found(states) - found(torch.zeros_like(states[:1, :1]))
