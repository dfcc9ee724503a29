"""What scorers and flags really keep of a sequence is inside what is planned."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ullage import Execution, ModelSpec
from ullage.kv.cache import PagedCache, cache_argument
from ullage.kv.pool import HeapBlocks
from ullage.specs.workload import Step
from ullage.techniques.dms.measure import measure
from ullage.techniques.dms.overhead import state_bytes
from ullage.techniques.dms.settings import DMS

TinyModel = Callable[..., tuple[Any, ModelSpec]]
IDS = torch.randint(6, 64, (1, 200), generator=torch.Generator().manual_seed(1))


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from tensors_in(part)


def held_bytes(cache: PagedCache) -> int:
    """Memory behind whatever rows keep beside their blocks, each piece of it once."""
    rows: list[Any] = [row for layer in cache.paged for row in layer.rows]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for row in rows
        for tensor in tensors_in(tuple(vars(row.scorer).values()))
    }
    return sum(storages.values()) + sum(head._stays.nbytes for row in rows for head in row.heads)


@pytest.mark.parametrize("predictor", ["expected-attention", "window", "linear"])
@pytest.mark.parametrize("lag", [0, 40])
@pytest.mark.parametrize("sizes", [[200], [1] * 200, [65, 1, 63, 71], [150, *[1] * 50]], ids=len)
def test_state_is_no_more_than_is_planned(
    tiny_model: TinyModel, tmp_path: Path, predictor: Any, lag: int, sizes: list[int]
) -> None:
    model, spec = tiny_model("llama")
    adapter = tmp_path / "tiny.safetensors"
    measure(model, [IDS[0]], {}).save(adapter)
    dms = DMS(0.25, 104, predictor, str(adapter) if predictor == "linear" else "", lag)
    cache = PagedCache(spec, HeapBlocks(spec.head_dim, model.dtype, model.device), dms.rows(spec))
    execution, read = Execution(dtype="fp32", kv_dtype="fp32"), 0
    with dms.attach(model), torch.no_grad():
        for part in IDS.split(sizes, dim=1):
            model(part, **cache_argument(model, cache))
            read += part.shape[1]
            work = Step("decode", 1, read, 1, execution)
            assert held_bytes(cache) <= state_bytes(dms, spec, work, dms._kinds(spec))
