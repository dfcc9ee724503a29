"""The catalogs of models and devices, as tables and as JSON."""

from dataclasses import asdict
from typing import Any

from rich.table import Table

from ullage.planner.memory import kv_bytes_per_token
from ullage.specs import device, sources
from ullage.specs.plan import Recipe
from ullage.specs.workload import Execution, Workload
from ullage.units import format_bytes


def models() -> list[dict[str, Any]]:
    """One row a model of the catalog; KV bytes are those of bf16."""
    return [_model(name) for name in sources.catalog()]


def _model(name: str) -> dict[str, Any]:
    spec = sources.resolve(name)
    recipe = Recipe(spec, device.Device("", "cuda", 1), Workload(1, 1), Execution())
    return {
        "name": name,
        "family": spec.family,
        "parameters": spec.parameters,
        "active_parameters": spec.active_parameters,
        "max_context_tokens": spec.max_context_tokens,
        "kv_bytes_per_token": kv_bytes_per_token(recipe),
        "source": spec.source,
    }


def devices() -> list[dict[str, Any]]:
    """One row a device of the catalog."""
    return [asdict(found) for found in device.catalog().values()]


def models_table(wide: bool) -> Table:
    """`models` for people: where they are from, if there is room."""
    table = Table("model", box=None, pad_edge=False)
    for column in ("parameters", "active", "context", "KV a token"):
        table.add_column(column, justify="right", no_wrap=True)
    if wide:
        table.add_column("from")
    for row in models():
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e9:,.2f}B",
            f"{row['active_parameters'] / 1e9:,.2f}B",
            f"{row['max_context_tokens']:,}",
            format_bytes(row["kv_bytes_per_token"]),
            *([row["source"]] if wide else ()),
        )
    return table


def devices_table(wide: bool) -> Table:
    """`devices` for people: where the figures are from, if there is room."""
    table = Table("device", "kind", box=None, pad_edge=False)
    for column in ("memory", "GB/s", "bf16 Tflop/s", "fp8"):
        table.add_column(column, justify="right", no_wrap=True)
    if wide:
        table.add_column("from")
    for row in devices():
        table.add_row(
            row["name"],
            row["kind"],
            format_bytes(row["memory_bytes"]),
            _scaled(row["bandwidth_bytes_s"], 1e9),
            _scaled(row["bf16_flops"], 1e12),
            _scaled(row["fp8_flops"], 1e12),
            *([row["source"]] if wide else ()),
        )
    return table


def _scaled(number: int | None, unit: float) -> str:
    return "" if number is None else f"{number / unit:,.4g}"
