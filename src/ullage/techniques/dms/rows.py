"""The rows of a layer that DMS acts on: sparse, with the scorer that was asked for."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ullage.kv.cache import MakeRow
from ullage.kv.pool import Blocks
from ullage.kv.sparse import Scorer, SparseRow
from ullage.specs.survivors import Survival
from ullage.techniques.dms.expected import ExpectedAttention
from ullage.techniques.dms.recent import Recent

if TYPE_CHECKING:
    from ullage.techniques.dms.settings import DMS


def row_maker(dms: "DMS", survivals: Sequence[Survival]) -> MakeRow:
    """Makes a row for one sequence in one layer, whose heads survive as `survivals` say."""
    scorers: dict[str, Callable[[], Scorer]] = {
        "expected-attention": ExpectedAttention,
        "window": Recent,
    }
    make_scorer = scorers[dms.predictor]

    def make_row(pool: Blocks, num_kv_heads: int) -> SparseRow:
        return SparseRow(pool, survivals, make_scorer())

    return make_row
