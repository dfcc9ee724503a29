"""Layers of experts: how many there are, how many a token goes through, and their weights."""

from collections.abc import Iterable
from typing import NamedTuple

from ullage.errors import ModelError, UnknownArchitecture
from ullage.specs.config import Config
from ullage.specs.families.base import MLP, Layers, Tensors, gated_mlp, linear, vector
from ullage.specs.model import ModelSpec, Role, TensorSpec

_LAYER = "model.layers.{}"
_MOST_EXPERTS = 1 << 16


class Mixture(NamedTuple):
    """How many experts a layer has, how many a token goes through, and their widths; `shared` is
    the width of the expert that every token goes through, 0 for none."""

    experts: int
    active: int
    inner: int
    shared: int = 0

    @property
    def width(self) -> int:
        """Width of all that one token goes through."""
        return self.active * self.inner + self.shared


def mixture(config: Config) -> Mixture:
    """What the config says of experts, in any family's words.

    Raises:
        ModelError: a key is absent, or a token goes through more experts than there are.
    """
    count_key = config.either("n_routed_experts", "num_local_experts", "num_experts")
    active_key = config.either(
        "num_experts_per_tok", "num_experts_per_token", "top_k_experts", "experts_per_token"
    )
    inner = config.size(config.either("moe_intermediate_size", "intermediate_size"))
    experts = config.size(count_key, _MOST_EXPERTS)
    shared = config.count("shared_expert_intermediate_size")
    if not shared:
        shared = inner * config.count(config.either("n_shared_experts", "num_shared_experts"))
    return Mixture(experts, config.size(active_key, experts), inner, shared)


def expert_weights(
    prefix: str,
    mix: Mixture,
    width: int,
    layers: Layers,
    names: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj"),
) -> Tensors:
    """A module for each expert, as checkpoints hold them; the last of `names` leads back."""
    for name in names:
        shape = (width, mix.inner) if name == names[-1] else (mix.inner, width)
        each = f"{prefix}.experts.{{}}.{name}.weight"
        yield TensorSpec(each, shape, "expert", layers, mix.experts, mix.active)


def stacked(name: str, shape: tuple[int, ...], mix: Mixture, layers: Layers) -> TensorSpec:
    """A weight of all experts in one tensor of the checkpoint."""
    role: Role = "expert" if len(shape) > 1 else "other"
    return TensorSpec(name, shape, role, layers, mix.experts, mix.active)


def router(name: str, mix: Mixture, hidden: int, layers: Layers) -> TensorSpec:
    """Scores of the experts. No quantizer converts it: a wrong expert costs more than its bytes."""
    return TensorSpec(name, (mix.experts, hidden), "other", layers)


def step_layers(spec: ModelSpec, config: Config) -> Layers:
    """Qwen: every `decoder_sparse_step`-th layer has experts, but for `mlp_only_layers`."""
    step = config.optional_size("decoder_sparse_step") or 1
    plain = set(config.numbers("mlp_only_layers", spec.num_layers))
    return tuple(
        layer for layer in spec.all_layers if (layer + 1) % step == 0 and layer not in plain
    )


def later_layers(spec: ModelSpec, config: Config) -> Layers:
    """DeepSeek, GLM: the first layers have a plain MLP, unless `mlp_layer_types` says which."""
    types = config.names("mlp_layer_types", spec.num_layers, ("dense", "sparse"))
    if types is not None:
        return tuple(layer for layer, kind in enumerate(types) if kind == "sparse")
    if isinstance(config.get("moe_layer_freq"), list):
        return chosen_layers(spec, config.numbers("moe_layer_freq", spec.num_layers))
    if config.get("moe_layer_freq") not in (None, 1):
        raise UnknownArchitecture("There is no arithmetic for a moe_layer_freq other than 1.")
    return spec.all_layers[config.count("first_k_dense_replace") :]


def chosen_layers(spec: ModelSpec, flags: list[int]) -> Layers:
    """The layers that are marked with 1, of a mark for each.

    Raises:
        ModelError: not as many marks as layers.
    """
    if len(flags) != spec.num_layers or not set(flags) <= {0, 1}:
        raise ModelError(f"The model's config marks {len(flags)} of {spec.num_layers} layers.")
    return tuple(layer for layer, flag in enumerate(flags) if flag)


def others(spec: ModelSpec, layers: Iterable[int]) -> Layers:
    """The layers that are not in `layers`."""
    return tuple(sorted(set(spec.all_layers) - set(layers)))


def mixed_inner(config: Config) -> int:
    """The wider of the experts that a token goes through and the plain MLP."""
    return max(mixture(config).width, config.optional_size("intermediate_size") or 1)


def experts_inner(config: Config) -> int:
    """What the experts of a token are wide, where no layer has a plain MLP."""
    return mixture(config).width


def block_sparse(spec: ModelSpec, mix: Mixture, layers: Layers | None = None) -> Tensors:
    """Mixtral's router and experts, by the names of its checkpoint."""
    layers = spec.all_layers if layers is None else layers
    block, hidden = f"{_LAYER}.block_sparse_moe", spec.hidden_size
    yield router(f"{block}.gate.weight", mix, hidden, layers)
    yield from expert_weights(block, mix, hidden, layers, ("w1", "w3", "w2"))


def qwen_mlps(spec: ModelSpec, config: Config, layers: Layers) -> Tensors:
    """A router, experts, and perhaps a shared expert behind a gate, in `layers`; elsewhere plain
    MLPs."""
    mix, hidden, plain = mixture(config), spec.hidden_size, others(spec, layers)
    if plain:
        yield from gated_mlp(MLP, hidden, config.size("intermediate_size"), plain)
    yield router(f"{MLP}.gate.weight", mix, hidden, layers)
    yield from expert_weights(MLP, mix, hidden, layers)
    if mix.shared:
        yield from gated_mlp(f"{MLP}.shared_expert", hidden, mix.shared, layers)
        yield from linear(f"{MLP}.shared_expert_gate", 1, hidden, layers)


def deepseek_mlps(
    spec: ModelSpec, config: Config, balance: bool = True, stack: bool = False
) -> Tensors:
    """Plain MLPs first; then a router, its balancing bias, experts and shared experts."""
    mix, hidden, layers = mixture(config), spec.hidden_size, later_layers(spec, config)
    plain = others(spec, layers)
    yield from gated_mlp(MLP, hidden, config.size("intermediate_size"), plain)
    yield router(f"{MLP}.gate.weight", mix, hidden, layers)
    if balance:
        yield vector(f"{MLP}.gate.e_score_correction_bias", mix.experts, layers)
    if stack:
        yield stacked(f"{MLP}.experts.gate_up_proj", (2 * mix.inner, hidden), mix, layers)
        yield stacked(f"{MLP}.experts.down_proj", (hidden, mix.inner), mix, layers)
    else:
        yield from expert_weights(MLP, mix, hidden, layers)
    if mix.shared:
        yield from gated_mlp(f"{MLP}.shared_experts", hidden, mix.shared, layers)
