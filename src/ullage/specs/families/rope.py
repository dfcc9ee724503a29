"""The tables of cosines and sines that an engine keeps for a model's rotary positions.

Rows and widths are those of vLLM's `rotary_embedding` module, which makes one table for each
distinct setting: `max_position_embeddings` rows, times the factor where positions are interpolated,
or the original positions times the factor (YaRN).
"""

from collections.abc import Mapping
from typing import Any

from ullage.errors import ModelError, UnknownArchitecture
from ullage.specs.config import LARGEST_SIZE, Config
from ullage.specs.model import ModelSpec, RopeTable

_AS_TRAINED = ("default", "llama3", "proportional", "mrope")
_MROPE_ROWS = 4  # vLLM's MRotaryEmbedding has room for video: four times the positions


def none(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """Learned positions, or none at all."""
    return ()


def plain(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """One table for all layers, or one for each setting where kinds of layers differ in it."""
    width = _width(config, spec.head_dim)
    return tuple(table(config, kind, width) for kind in _kinds(config) or [_settings(config)])


def multimodal(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """A table with room for the positions of frames."""
    width = _width(config, spec.head_dim)
    return (RopeTable(_MROPE_ROWS * config.size("max_position_embeddings"), width),)


def latent(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """Latent attention rotates a part of its own."""
    width = config.optional_size("qk_rope_head_dim")
    return () if width is None else (table(config, _settings(config), width),)


def two_kinds(spec: ModelSpec, config: Config) -> tuple[RopeTable, ...]:
    """Gemma 3 and Olmo 3: sliding layers turn at a base of their own, or without the scaling."""
    whole = plain(spec, config)
    if _kinds(config) or not (_settings(config) or config.get("rope_local_base_freq")):
        return whole
    return (*whole, table(config, {}, spec.head_dim))


def table(config: Config, settings: Mapping[str, Any], width: int) -> RopeTable:
    """The table of one setting.

    Raises:
        UnknownArchitecture: a scaling that has no arithmetic here.
        ModelError: a value that cannot be true.
    """
    reader = Config(settings, {}, {})
    kind = reader.get("rope_type") or reader.get("type") or "default"
    positions = config.size("max_position_embeddings")
    original = (
        reader.optional_size("original_max_position_embeddings")
        or config.optional_size("original_max_position_embeddings")
        or positions
    )
    factor = reader.optional_number("factor") or 1.0
    rows = {
        **dict.fromkeys(_AS_TRAINED, positions),
        "linear": positions * factor,
        "dynamic": positions * factor,
        "yarn": original * factor,
        "deepseek_yarn": original * factor,
        # a short and a long table
        "longrope": original + positions,
        "su": original + positions,
    }.get(kind if isinstance(kind, str) else "")
    if rows is None:
        raise UnknownArchitecture(f"There is no arithmetic for the rotary scaling {kind!r:.60}.")
    if rows > LARGEST_SIZE:
        raise ModelError(f"The model's config makes a rotary table of {rows:.3g} rows.")
    return RopeTable(int(rows), width)


def _settings(config: Config) -> Mapping[str, Any]:
    """The rotary settings as transformers 5 spells them, or as configs before it did."""
    return config.section("rope_parameters") or config.section("rope_scaling")


def _kinds(config: Config) -> list[Mapping[str, Any]]:
    """The distinct settings of kinds of layers, where the config has one for each."""
    kinds = [value for value in _settings(config).values() if isinstance(value, dict)]
    return [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]]


def _width(config: Config, head_dim: int) -> int:
    """Numbers of a head that turn with the position."""
    settings = Config(_settings(config), {}, {})
    key = "partial_rotary_factor"
    part = settings.optional_number(key) or config.optional_number(key)
    if part is None:  # MiniMax M2 counts them itself
        return min(config.optional_size("rotary_dim") or head_dim, head_dim)
    return int(head_dim * min(part, 1.0))
