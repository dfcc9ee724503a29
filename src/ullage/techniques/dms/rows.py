"""The rows of a layer that DMS acts on: sparse, with the scorer that was asked for."""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING

import numpy
import torch

from ullage.kv.cache import MakeRow
from ullage.kv.pool import Blocks
from ullage.kv.sparse import Scorer, SparseRow
from ullage.specs.survivors import Survival
from ullage.techniques.dms.expected import ExpectedAttention
from ullage.techniques.dms.learned import Learned
from ullage.techniques.dms.recent import Recent

if TYPE_CHECKING:
    from ullage.techniques.dms.settings import DMS


def row_maker(
    dms: "DMS", survivals: Sequence[Survival], weights: numpy.ndarray | None = None
) -> MakeRow:
    """Makes a row for one sequence in one layer, whose heads survive as `survivals` say; `weights`,
    [Hkv, E], are those of a learned predictor there."""
    make_scorer: Callable[[], Scorer] = ExpectedAttention
    if dms.predictor == "window":
        make_scorer = Recent
    elif weights is not None:
        make_scorer = partial(Learned, cache(torch.from_numpy(weights).to))  # moved there once

    def make_row(pool: Blocks, num_kv_heads: int) -> SparseRow:
        return SparseRow(pool, survivals, make_scorer(), dms.lag)

    return make_row
