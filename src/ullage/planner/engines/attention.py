"""What ullage's own attention holds at its fullest: `kv/rows.py` lays entries out, `kv/kernels`
read them.

Letters as in the field: N new tokens of one sequence, T stored ones. Prompts are read one at a
time; the sequences of a batch that write a token each go together.
"""

from dataclasses import dataclass
from typing import Literal

from ullage.planner.engines import forward
from ullage.specs.blocks import entry_bytes
from ullage.specs.dtypes import DTYPE_BYTES, SCALED
from ullage.specs.footprint import Label, Term
from ullage.specs.layer import always_width
from ullage.specs.model import LayerCache, ModelSpec
from ullage.specs.plan import Recipe
from ullage.specs.tiles import (
    SPLIT_PROGRAMS,
    THREADS,
    TILE_TOKENS,
    rows_of_splits,
    tile_scores,
)
from ullage.specs.workload import Step

_Kernel = Literal["flash", "tiled", "split"]
_SOURCES: dict[_Kernel, tuple[Label, str]] = {
    "flash": ("exact", f"flash kernel, tiles of {TILE_TOKENS:,} entries at most"),
    "tiled": ("exact", f"tiled kernel, tiles of {TILE_TOKENS:,} entries at most"),
    "split": ("assumed", f"Triton kernel, {SPLIT_PROGRAMS} splits at most and one a head"),
}


def scratch_term(recipe: Recipe, step: Step) -> Term:
    """By how much attention stands above the widest place of a layer, in the layer where it stands
    highest."""
    layers = [_Attention(recipe, cache, step) for cache, _ in recipe.model.cache_kinds]
    highest = max(layers, key=lambda layer: layer.nbytes)
    above_bytes = max(0, highest.nbytes - forward.layer_term(recipe.model, step).nbytes)
    return Term("activation", "scratch of attention", above_bytes, *_SOURCES[highest.kernel])


@dataclass(frozen=True)
class _Attention:
    """The attention of one layer in one step."""

    recipe: Recipe
    cache: LayerCache
    step: Step

    @property
    def model(self) -> ModelSpec:
        return self.recipe.model

    @property
    def kernel(self) -> _Kernel:
        """As kv/attention.py chooses."""
        kind = self.recipe.device.kind
        if kind in ("cuda", "rocm"):
            return "split"
        return "flash" if kind == "cpu" and self.model.softcap is None else "tiled"

    @property
    def queries(self) -> int:
        """N."""
        return self.step.new_tokens if self.step.phase == "prefill" else 1

    @property
    def together(self) -> int:
        """Sequences in one call of the kernel."""
        return 1 if self.step.phase == "prefill" else self.step.new_tokens

    @property
    def rows(self) -> int:
        """Queries of all heads."""
        return self.model.num_heads * self.queries * self.together

    @property
    def laid_out(self) -> bool:
        """Whether a sliding layer lays its window and the chunk side by side, under a band mask: a
        single query reads the window where it lies."""
        return self.cache.window is not None and self.queries > 1

    @property
    def entries(self) -> int:
        """T: of the whole context, or of the window, the chunk beside it."""
        beside = self.queries if self.laid_out else 0
        return self.cache.kept_tokens(self.step.held_tokens) + beside

    @property
    def number_bytes(self) -> int:
        return DTYPE_BYTES[self.step.execution.dtype]

    @property
    def stored(self) -> str:
        """The format of the entries, as the kernel finds them."""
        return self.step.execution.dtype if self.laid_out else self.step.execution.kv_dtype

    @property
    def nbytes(self) -> int:
        """All that is alive while the kernel runs."""
        kernels = {"flash": self._flash, "tiled": self._tiled, "split": self._split}
        return self._layer_bytes() + self._row_bytes(kernels[self.kernel]())

    def _layer_bytes(self) -> int:
        """What lives through all layers, residual and normed input; q, k, v and, where a chunk is
        read, the output beside that of the kernel."""
        model = self.model
        outputs = 2 if self.queries > 1 else 1
        width = 2 * model.hidden_size + outputs * model.num_heads * model.head_dim
        width += self.cache.width
        return self.step.new_tokens * (always_width(model) + width) * self.number_bytes

    def _row_bytes(self, kernel_bytes: int) -> int:
        """What the row lays out for the kernel, and the kernel's own scratch."""
        execution = self.step.execution
        new = self.queries * entry_bytes(self.model, self.cache.width, execution.kv_dtype)
        rounded = new if execution.kv_dtype != execution.dtype else 0
        if not self.laid_out:
            return kernel_bytes + (rounded if self.queries > 1 else 0)
        band = self.queries * self.entries
        span = self.entries * self.cache.width * self.number_bytes
        return span + max(band + max(kernel_bytes, band), rounded)

    def _flash(self) -> int:
        """Of kernels/cpu.py: K and V of a tile in the query's format and the mask as what is added
        to the scores, then the tile's output, in fp32 where it is joined to what is joined so far.
        Sequences that write go one by one or some on threads, which share a tile among them; what
        each leaves is put together in the end."""
        model, execution = self.model, self.step.execution
        output = self.rows // self.together * model.head_dim
        at_once = min(self.together, THREADS)
        tile_tokens = max(min(TILE_TOKENS, at_once * self.entries), self.queries)
        converted = self._widened_bytes(tile_tokens, self.cache.width, execution.dtype)
        bias = self.queries * self.entries * self.number_bytes if self.laid_out else 0
        joined = widened = 0
        if not self.laid_out:
            joined = output * 4
            widened = 0 if self.number_bytes == 4 else output * 4
        part = at_once * (joined + output * self.number_bytes) + bias
        part += max(converted, at_once * widened)
        if self.queries > 1:
            return part + 5 * self.rows * 4
        left = self.together * output * self.number_bytes
        return left + max(left, part) + 5 * self.rows * 4

    def _tiled(self) -> int:
        """Of kernels/reference.py: what is joined so far in fp32; of one sequence, in fp32 too, a
        tile's scores and mask, the grouped queries and K of the tile, then its output and V. In the
        end what is joined, in the query's format."""
        rows, head_dim = self.rows // self.together, self.model.head_dim
        joined = self.rows * (head_dim + 1) * 4
        scores = tile_scores(rows, self.entries) * 4
        tile_tokens = min(TILE_TOKENS, self.entries)
        mask = self.queries * tile_tokens if self.queries > 1 else 0
        converted = self._widened_bytes(tile_tokens, self.cache.width // 2, "fp32")
        tile = rows * (head_dim + 4) * 4 + scores + mask + converted
        rounded = 0 if self.number_bytes == 4 else self.rows * head_dim * self.number_bytes
        return joined + max(tile, rounded)

    def _widened_bytes(self, tokens: int, width: int, dtype: str) -> int:
        """That many numbers of each token in `dtype`, in which they may be already; and with them
        the scales of K or of V. To fp16 they are multiplied in fp32."""
        if self.stored == dtype:
            return 0
        if self.stored not in SCALED:
            return tokens * width * DTYPE_BYTES[dtype]
        in_dtype = "fp32" if dtype == "fp16" else dtype
        return tokens * (width + self.model.num_kv_heads) * DTYPE_BYTES[in_dtype]

    def _split(self) -> int:
        """Of kernels/triton.py: the splits' outputs and log-sum-exps in fp32, what is joined, and
        the list of the work."""
        heads, head_dim = self.model.num_kv_heads * self.together, self.model.head_dim
        rows = self.rows // heads
        split_rows = rows_of_splits(rows, heads * self.entries, heads)
        work = (2 * 17 * heads + 5 * (split_rows // rows) + heads + 1) * 8
        return split_rows * (head_dim + 1) * 4 + self.rows * head_dim * self.number_bytes + work
