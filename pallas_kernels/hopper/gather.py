"""Attention over lists of cache rows on Hopper: column-sparse attention and boxed windows.

A work item is a tile of queries with its own list of keys, single rows or runs of 8. A producer
warpgroup follows the list with `cp.async`, since TMA cannot; the rest is the shared pipeline.
Queries are consecutive tokens (column groups) or an 8x16 patch of the grid (boxes).
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.hopper._pipeline import Item, Pipeline, scratch
from pallas_kernels.hopper._rows import RowGather, wait_copies
from pallas_kernels.hopper.tuning import GatherConfig


@dataclasses.dataclass(frozen=True)
class Patches:
    """Tiles that are patches of `height` x `width` queries, `across` of them side by side."""

    height: int
    width: int
    across: int
    grid_height: int


@dataclasses.dataclass(frozen=True)
class GatherInputs:
    """Device arrays of one call; items are numbered (n, tile) in row-major order.

    lists [tables, cap], counts [tables]: list entries and keys (not entries) of every tile, where
    tables is the number of tiles (shared by heads) or of items. q is [n, T, D], or [n * height,
    width, D] for patches. order [ctas, steps], lengths [ctas]: work items of every CTA.
    words: visibility of every pair in stages of 64 keys (`boxes_table.mask_words`), when exact.
    """

    q: Float[Array, "..."]
    k: Float[Array, "m S D"]
    v: Float[Array, "m S D"]
    lists: Int[Array, "tables cap"]
    counts: Int[Array, " tables"]
    order: Int[Array, "ctas steps"]
    lengths: Int[Array, " ctas"]
    words: Int[Array, "tables stages warpgroups 128"] | None = None

    def named(self) -> dict[str, Array]:
        """The arrays that are there, by name."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def gather_attention(
    inputs: GatherInputs,
    config: GatherConfig,
    softmax: mosaic.Softmax,
    *,
    heads: int,
    tiles: int,
    granularity: int,
    hidden: tuple[tuple[int, int], ...],
    patches: Patches | None,
) -> Float[Array, "..."]:
    """Attention output, token-major: q's [n, ...] becomes [n / heads, ...] with heads * D columns.

    patches: how tiles lie on the query grid; None for consecutive queries.
    hidden: static row ranges whose keys do not count.
    """
    (lead, tokens, head_dim), dtype = inputs.q.shape, inputs.q.dtype
    rows = RowGather(config.block_k, head_dim, inputs.k.shape[1], granularity, hidden)
    operands = inputs.named()
    buffers = scratch(config, head_dim, dtype, patches.height if patches else 1)
    # One buffer for both, since every buffer is rounded up to 1 KiB: rows, then a flag per stage.
    buffers["row_smem"] = plgpu.SMEM((config.stages * (config.block_k + 1),), jnp.int32)

    def gather_kernel(*refs, **scratch_refs):
        gmem = dict(zip([*operands, "out"], refs, strict=True))
        call = _Gather(gmem, scratch_refs, config, softmax, heads)
        call.rows, call.tiles, call.patches = rows, tiles, patches
        call.shared = inputs.counts.shape[0] == tiles
        call.run()

    return mosaic.kernel(
        gather_kernel,
        out_type=jax.ShapeDtypeStruct((lead // heads, tokens, heads * head_dim), dtype),
        grid=(inputs.order.shape[0],),
        num_threads=config.consumers + 1,
        scratch_types=buffers,
        compiler_params=mosaic.compiler_params(),
    )(*operands.values())


class _Gather(Pipeline):
    """Items are query tiles, stages are `block_k` keys of the tile's list."""

    rows: RowGather
    tiles: int
    patches: Patches | None
    shared: bool

    def item(self, number, first) -> Item:
        index = self.gmem["order"][self.cta, number]
        head, tile = lax.div(index, self.tiles), lax.rem(index, self.tiles)
        table = tile if self.shared else index
        count = self.gmem["counts"][table]
        stages = lax.div(count + self.config.block_k - 1, self.config.block_k)
        stages = jnp.maximum(stages, self.config.least_stages)
        item = Item(number, head, tile, table, stages, first)
        item.keys = count
        return item

    def produce(self) -> None:
        plgpu.set_max_registers(self.config.producer_registers, action="decrease")

        def body(item: Item):
            plgpu.barrier_wait(self.q_empty.at[item.buffer])
            self.load_queries(item)
            rows = self._read(item, 0), self._read(item, 1)
            lax.fori_loop(0, item.stages, lambda step, rows: self._bring(item, step, *rows), rows)

        total = self.for_items(body)
        wait_copies(0)
        for behind in range(self.config.lag, 0, -1):
            number = total - behind
            self._announce(self.k_full, number)
            self._announce(self.v_full, number)

    def _announce(self, barriers, number) -> None:
        """Tell consumers that a stage (counted over the CTA's life) has arrived."""
        stage = lax.rem(number + self.config.stages, self.config.stages)
        pl.when(number >= 0)(lambda: plgpu.barrier_arrive(barriers.at[stage]))

    def _grid_row(self, item: Item, row):
        """Grid row and columns of row `row` of the item's patch."""
        patches = self.patches
        y = lax.div(item.tile, patches.across) * patches.height + row
        return y, pl.ds(lax.rem(item.tile, patches.across) * patches.width, patches.width)

    def load_queries(self, item: Item) -> None:
        if self.patches is None:
            super().load_queries(item)
            return
        width, first = self.patches.width, item.head * self.patches.grid_height
        for row in range(self.patches.height):
            y, across = self._grid_row(item, row)
            place = self.gmem["q"].at[first + y, across]
            part = self.q_smem.at[item.buffer, pl.ds(row * width, width)]
            plgpu.copy_gmem_to_smem(place, part, self.q_full.at[item.buffer])

    def store_output(self, item: Item, warpgroup) -> None:
        if self.patches is None:
            super().store_output(item, warpgroup)
            return
        width, height = self.patches.width, self.patches.grid_height
        batch_row, columns = self.output_place(item)
        for number in range(64 // width):
            row = warpgroup * (64 // width) + number
            y, across = self._grid_row(item, row)
            place = self.gmem["out"].at[batch_row * height + y, across, columns]
            part = self.q_smem.at[item.buffer, pl.ds(row * width, width)]
            pl.when(y < height)(lambda part=part, place=place: plgpu.copy_smem_to_gmem(part, place))

    def _read(self, item: Item, step):
        first = step * self.config.block_k
        return self.rows.read_rows(self.gmem["lists"], item.table, first, item.keys)

    def _bring(self, item: Item, step, rows, next_rows):
        """Start this stage's copies, announce the one `lag` before, look up rows two ahead."""
        far_rows = self._read(item, step + 2)
        stage = self.stage(item, step)
        arrived = item.first + step - self.config.lag
        plgpu.barrier_wait(self.k_empty.at[stage])
        self.rows.publish(rows, self.row_smem, stage)
        self.rows.copy(self.gmem["k"], item.head, rows, self.k_smem.at[stage])
        wait_copies(2 * self.config.lag)
        self._announce(self.k_full, arrived)
        plgpu.barrier_wait(self.v_empty.at[stage])
        self.rows.copy(self.gmem["v"], item.head, rows, self.v_smem.at[stage])
        wait_copies(2 * self.config.lag)
        self._announce(self.v_full, arrived)
        return next_rows, far_rows

    def look_ahead(self, item: Item, step):
        if "words" not in self.gmem:
            return None
        warpgroup = lax.axis_index("wg")
        return mosaic.load_words(self.gmem["words"].at[item.table, step, warpgroup])

    def hide(self, scores, item: Item, step, ahead):
        """Pairs the words hide; without words, keys past the list's end and in hidden rows."""
        if ahead is not None:
            return mosaic.apply_words(scores, ahead)
        stage = self.stage(item, step)

        def masked():
            place = self.row_smem.at[pl.ds(stage * self.config.block_k, self.config.block_k)]
            rows = mosaic.load(place, mosaic.COLUMN)
            return jnp.where(lax.broadcast_in_dim(rows, scores.shape, [1]) >= 0, scores, -jnp.inf)

        flags = self.config.stages * self.config.block_k
        return lax.cond(self.row_smem[flags + stage] > 0, masked, lambda: scores)
