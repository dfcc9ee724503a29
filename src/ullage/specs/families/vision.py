"""Tensors of vision encoders and their projectors: towers with names and shapes of transformers'
classes. Quantized checkpoints leave them in the model's dtype."""

from collections.abc import Callable, Mapping

from ullage.errors import ModelError
from ullage.specs.config import Config
from ullage.specs.families.base import MOST_LAYERS, Layers, Tensors, layer_norm, norms, vector
from ullage.specs.model import ModelSpec, TensorSpec

_MOST_MERGED = 64  # patches a side that a projector joins


def _weight(name: str, shape: tuple[int, ...], layers: Layers = ()) -> TensorSpec:
    return TensorSpec(name, shape, "other", layers)


def _linear(name: str, out: int, width: int, layers: Layers = (), bias: bool = True) -> Tensors:
    yield _weight(f"{name}.weight", (out, width), layers)
    if bias:
        yield vector(f"{name}.bias", out, layers)


def _layers(config: Config, key: str) -> Layers:
    return tuple(range(config.size(key, MOST_LAYERS)))


def _patches(config: Config) -> int:
    """Patches of a whole picture."""
    return int((config.size("image_size") // config.size("patch_size")) ** 2)


def _clip_blocks(config: Config, tower: str) -> Tensors:
    """What CLIP and SigLIP share."""
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    layers, block = _layers(config, "num_hidden_layers"), f"{tower}.encoder.layers.{{}}"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        yield from _linear(f"{block}.self_attn.{name}", width, width, layers)
    yield from _linear(f"{block}.mlp.fc1", inner, width, layers)
    yield from _linear(f"{block}.mlp.fc2", width, inner, layers)
    for name in ("layer_norm1", "layer_norm2"):
        yield from layer_norm(f"{block}.{name}", width, layers)


def _patch_embedding(config: Config, name: str) -> TensorSpec:
    patch = config.size("patch_size")
    shape = (config.size("hidden_size"), config.size("num_channels"), patch, patch)
    return _weight(name, shape)


def siglip(config: Config) -> Tensors:
    """SigLIP, with its pooling head unless `vision_use_head` is false."""
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    tower = "vision_tower"
    yield _patch_embedding(config, f"{tower}.embeddings.patch_embedding.weight")
    yield vector(f"{tower}.embeddings.patch_embedding.bias", width)
    yield _weight(f"{tower}.embeddings.position_embedding.weight", (_patches(config), width))
    yield from _clip_blocks(config, tower)
    yield from layer_norm(f"{tower}.post_layernorm", width)
    if config.get("vision_use_head") is False:
        return
    yield _weight(f"{tower}.head.probe", (1, 1, width))
    yield _weight(f"{tower}.head.attention.in_proj_weight", (3 * width, width))
    yield vector(f"{tower}.head.attention.in_proj_bias", 3 * width)
    yield from _linear(f"{tower}.head.attention.out_proj", width, width)
    yield from layer_norm(f"{tower}.head.layernorm", width)
    yield from _linear(f"{tower}.head.mlp.fc1", inner, width)
    yield from _linear(f"{tower}.head.mlp.fc2", width, inner)


def clip(config: Config) -> Tensors:
    """CLIP's vision tower."""
    width, tower = config.size("hidden_size"), "vision_tower"
    yield vector(f"{tower}.embeddings.class_embedding", width)
    yield _patch_embedding(config, f"{tower}.embeddings.patch_embedding.weight")
    yield _weight(f"{tower}.embeddings.position_embedding.weight", (_patches(config) + 1, width))
    yield from layer_norm(f"{tower}.pre_layrnorm", width)
    yield from _clip_blocks(config, tower)
    yield from layer_norm(f"{tower}.post_layernorm", width)


def _pixtral(config: Config) -> Tensors:
    """Pixtral: no biases, rotary positions."""
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    layers, block = (
        _layers(config, "num_hidden_layers"),
        "vision_tower.transformer.layers.{}",
    )
    yield _patch_embedding(config, "vision_tower.patch_conv.weight")
    yield vector("vision_tower.ln_pre.weight", width)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from _linear(f"{block}.attention.{name}", width, width, layers, bias=False)
    yield from _linear(f"{block}.feed_forward.gate_proj", inner, width, layers, bias=False)
    yield from _linear(f"{block}.feed_forward.up_proj", inner, width, layers, bias=False)
    yield from _linear(f"{block}.feed_forward.down_proj", width, inner, layers, bias=False)
    yield from norms(block, ("attention_norm", "ffn_norm"), width, layers)


TOWERS: Mapping[str, Callable[[Config], Tensors]] = {
    "siglip_vision_model": siglip,
    "clip_vision_model": clip,
}


def llava_projector(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """Two linear layers from the features of some layers to the text model's width."""
    features = outer.get("vision_feature_layer")
    count = len(features) if isinstance(features, list) and 0 < len(features) < 64 else 1
    bias = outer.get("multimodal_projector_bias") is not False
    name, hidden = "multi_modal_projector", spec.hidden_size
    width = config.size("hidden_size")
    yield from _linear(f"{name}.linear_1", hidden, count * width, bias=bias)
    yield from _linear(f"{name}.linear_2", hidden, hidden, bias=bias)


def gemma3(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """SigLIP and one projection."""
    width, name = config.size("hidden_size"), "multi_modal_projector"
    yield from siglip(config)
    yield _weight(f"{name}.mm_input_projection_weight", (width, spec.hidden_size))
    yield vector(f"{name}.mm_soft_emb_norm.weight", width)


def mistral3(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """Pixtral, a merger of neighbouring patches, and two linear layers."""
    width, name = config.size("hidden_size"), "multi_modal_projector"
    side = outer.optional_size("spatial_merge_size", _MOST_MERGED) or 2
    bias, hidden = outer.flag("multimodal_projector_bias"), spec.hidden_size
    yield from _pixtral(config)
    yield vector(f"{name}.norm.weight", width)
    merger = f"{name}.patch_merger.merging_layer"
    yield from _linear(merger, width, width * side**2, bias=False)
    yield from _linear(f"{name}.linear_1", hidden, width, bias=bias)
    yield from _linear(f"{name}.linear_2", hidden, hidden, bias=bias)


def gemma4(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """Gemma 4's own tower.

    Raises:
        ModelError: clipped linear layers, which have more tensors.
    """
    if config.flag("use_clipped_linears"):
        raise ModelError("there is no arithmetic for use_clipped_linears.")
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    patch = config.size("patch_size")
    heads, dim = config.size("num_attention_heads"), config.size("head_dim")
    kv_heads = config.optional_size("num_key_value_heads") or heads
    layers, tower = _layers(config, "num_hidden_layers"), "model.vision_tower"
    block = f"{tower}.encoder.layers.{{}}"
    if config.flag("standardize"):
        yield vector(f"{tower}.std_bias", width)
        yield vector(f"{tower}.std_scale", width)
    table = (2, config.size("position_embedding_size"), width)
    yield _weight(f"{tower}.patch_embedder.position_embedding_table", table)
    yield _weight(f"{tower}.patch_embedder.input_proj.weight", (width, 3 * patch**2))
    for name, out, columns in (
        ("self_attn.q_proj", heads * dim, width),
        ("self_attn.k_proj", kv_heads * dim, width),
        ("self_attn.v_proj", kv_heads * dim, width),
        ("self_attn.o_proj", width, heads * dim),
        ("mlp.gate_proj", inner, width),
        ("mlp.up_proj", inner, width),
        ("mlp.down_proj", width, inner),
    ):
        yield _weight(f"{block}.{name}.linear.weight", (out, columns), layers)
    yield from norms(f"{block}.self_attn", ("q_norm", "k_norm"), dim, layers)
    four = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    yield from norms(block, tuple(f"{name}_layernorm" for name in four), width, layers)
    yield _weight("model.embed_vision.embedding_projection.weight", (spec.hidden_size, width))


def _qwen_patches(config: Config, tower: str) -> Tensors:
    patch, frames = config.size("patch_size"), config.size("temporal_patch_size")
    width = config.size("hidden_size")
    shape = (width, config.size("in_channels"), frames, patch, patch)
    yield _weight(f"{tower}.patch_embed.proj.weight", shape)


def qwen3(spec: ModelSpec, config: Config, outer: Config, deep: bool = True) -> Tensors:
    """Qwen3-VL: a tower, its merger, and one more merger for each deepstack layer."""
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    layers, tower = _layers(config, "depth"), "model.visual"
    block = f"{tower}.blocks.{{}}"
    yield from _qwen_patches(config, tower)
    yield vector(f"{tower}.patch_embed.proj.bias", width)
    positions = (config.size("num_position_embeddings"), width)
    yield _weight(f"{tower}.pos_embed.weight", positions)
    yield from _linear(f"{block}.attn.qkv", 3 * width, width, layers)
    yield from _linear(f"{block}.attn.proj", width, width, layers)
    yield from _linear(f"{block}.mlp.linear_fc1", inner, width, layers)
    yield from _linear(f"{block}.mlp.linear_fc2", width, inner, layers)
    for name in ("norm1", "norm2"):
        yield from layer_norm(f"{block}.{name}", width, layers)
    out = config.optional_size("out_hidden_size") or spec.hidden_size
    joined = width * config.size("spatial_merge_size", _MOST_MERGED) ** 2
    yield from _merger(f"{tower}.merger", width, joined, out)
    if deep:
        count = len(config.numbers("deepstack_visual_indexes", len(layers)))
        if extra := tuple(range(count)):
            name = f"{tower}.deepstack_merger_list.{{}}"
            yield from _merger(name, joined, joined, out, extra)


def _merger(name: str, norm: int, joined: int, out: int, layers: Layers = ()) -> Tensors:
    yield from layer_norm(f"{name}.norm", norm, layers)
    yield from _linear(f"{name}.linear_fc1", joined, joined, layers)
    yield from _linear(f"{name}.linear_fc2", out, joined, layers)


def qwen3_5(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """Qwen3-VL's tower without the deep mergers."""
    return qwen3(spec, config, outer, deep=False)


def qwen2_5(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """Qwen2.5-VL: a gated MLP and RMS norms."""
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    layers, tower = _layers(config, "depth"), "visual"
    block = f"{tower}.blocks.{{}}"
    yield from _qwen_patches(config, tower)
    yield from _linear(f"{block}.attn.qkv", 3 * width, width, layers)
    yield from _linear(f"{block}.attn.proj", width, width, layers)
    yield from _linear(f"{block}.mlp.gate_proj", inner, width, layers)
    yield from _linear(f"{block}.mlp.up_proj", inner, width, layers)
    yield from _linear(f"{block}.mlp.down_proj", width, inner, layers)
    yield from norms(block, ("norm1", "norm2"), width, layers)
    joined = width * config.size("spatial_merge_size", _MOST_MERGED) ** 2
    out = config.optional_size("out_hidden_size") or spec.hidden_size
    yield vector(f"{tower}.merger.ln_q.weight", width)
    yield from _linear(f"{tower}.merger.mlp.0", joined, joined)
    yield from _linear(f"{tower}.merger.mlp.2", out, joined)


def llama4(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """Llama 4's tower, its adapter over shuffled pixels, and one projection."""
    width, inner = config.size("hidden_size"), config.size("intermediate_size")
    patch = config.size("patch_size")
    layers, tower = _layers(config, "num_hidden_layers"), "vision_model"
    block = f"{tower}.model.layers.{{}}"
    yield vector(f"{tower}.class_embedding", width)
    yield _weight(f"{tower}.positional_embedding_vlm", (_patches(config) + 1, width))
    columns = config.size("num_channels") * patch**2
    yield from _linear(f"{tower}.patch_embedding.linear", width, columns, bias=False)
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        yield from _linear(f"{block}.self_attn.{name}", width, width, layers)
    yield from _linear(f"{block}.mlp.fc1", inner, width, layers)
    yield from _linear(f"{block}.mlp.fc2", width, inner, layers)
    for name in (f"{block}.input_layernorm", f"{block}.post_attention_layernorm"):
        yield from layer_norm(name, width, layers)
    for name in (f"{tower}.layernorm_pre", f"{tower}.layernorm_post"):
        yield from layer_norm(name, width)
    projected, out = config.size("projector_input_dim"), config.size("projector_output_dim")
    yield from _linear(f"{tower}.vision_adapter.mlp.fc1", projected, inner, bias=False)
    yield from _linear(f"{tower}.vision_adapter.mlp.fc2", out, out, bias=False)
    name = "multi_modal_projector.linear_1"
    yield from _linear(name, spec.hidden_size, config.size("vision_output_dim"), bias=False)


def kimi(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """MoonViT and a projector over patches joined two by two."""
    width = config.size(config.either("vt_hidden_size", "hidden_size"))
    inner = config.size(config.either("vt_intermediate_size", "intermediate_size"))
    layers = _layers(config, config.either("vt_num_hidden_layers", "num_hidden_layers"))
    patch = config.size("patch_size")
    tower, hidden = "vision_tower", spec.hidden_size
    block = f"{tower}.encoder.blocks.{{}}"
    rows = (config.size("init_pos_emb_height"), config.size("init_pos_emb_width"), width)
    yield _weight(f"{tower}.patch_embed.pos_emb.weight", rows)
    yield _weight(f"{tower}.patch_embed.proj.weight", (width, 3, patch, patch))
    yield vector(f"{tower}.patch_embed.proj.bias", width)
    yield from _linear(f"{block}.wqkv", 3 * width, width, layers)
    yield from _linear(f"{block}.wo", width, width, layers)
    yield from _linear(f"{block}.mlp.fc0", inner, width, layers)
    yield from _linear(f"{block}.mlp.fc1", width, inner, layers)
    for name in ("norm0", "norm1"):
        yield from layer_norm(f"{block}.{name}", width, layers)
    yield from layer_norm(f"{tower}.encoder.final_layernorm", width)
    yield from layer_norm("mm_projector.pre_norm", width)
    yield from _linear("mm_projector.proj.0", 4 * width, 4 * width)
    yield from _linear("mm_projector.proj.2", hidden, 4 * width)


def minimax(spec: ModelSpec, config: Config, outer: Config) -> Tensors:
    """MiniMax M3: CLIP's blocks with rotary positions, and two projectors, one after the other."""
    width, patch = config.size("hidden_size"), config.size("patch_size")
    tower = "vision_tower.vision_model"
    settings = Config(config.section("img_token_compression_config"), {}, {})
    frames = settings.optional_size("temporal_patch_size", _MOST_MERGED) or 2
    side = settings.optional_size("spatial_merge_size", _MOST_MERGED) or 2
    shape = (width, config.size("num_channels"), frames, patch, patch)
    yield _weight(f"{tower}.embeddings.patch_embedding.weight", shape)
    yield from layer_norm(f"{tower}.pre_layrnorm", width)
    yield from _clip_blocks(config, tower)
    inner, hidden = outer.size("projector_hidden_size"), spec.hidden_size
    for name, columns in (("multi_modal_projector", width), ("patch_merge_mlp", hidden * side**2)):
        yield from _linear(f"{name}.linear_1", inner, columns)
        yield from _linear(f"{name}.linear_2", hidden, inner)
