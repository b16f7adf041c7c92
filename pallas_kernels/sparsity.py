"""Containers for sparse attention patterns, their numpy builders and validators.

Three patterns share this file: `BlockTable` (which key blocks a query block reads), `Geometry` with
windows (which rectangles of earlier grids a query patch reads) and column lists (which keys a query
group reads). Builders are numpy and run at trace time; a table may also hold traced arrays.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import Array, Bool, Int

from pallas_kernels.shapes import ceil_div, round_up

Gaps = tuple[tuple[int, int], ...]


def visible_rows(rows: int, kv_length: int, gaps: Gaps = ()) -> Bool[np.ndarray, " rows"]:
    """Which cache rows hold keys: those before `kv_length` outside every [start, stop) gap."""
    seen = np.arange(rows) < kv_length
    for start, stop in gaps:
        if not 0 <= start <= stop <= kv_length:
            raise ValueError(
                f"a gap [start, stop) must lie in 0..{kv_length}. Got {(start, stop)}. "
                "Rows after kv_length are hidden without a gap."
            )
        seen[start:stop] = False
    return seen


@dataclass(frozen=True, eq=False)
class BlockTable:
    """Key blocks read by every query block, compact and in reading order.

    indices: int32 [nq, cap] shared by rows and heads, or [R, H, nq, cap]; entries past the count
        are ignored but must be valid block numbers.
    counts: int32 [nq] or [R, H, nq]; a count of zero gives an output of zeros.
    numpy arrays are static (baked into the compiled program), jax arrays are traced.
    Keys at and beyond `kv_length` and in the row ranges of `gaps` never enter a result.
    """

    indices: np.ndarray | Int[Array, "*rh nq cap"]
    counts: np.ndarray | Int[Array, "*rh nq"]
    kv_length: int
    block_q: int = 128
    block_k: int = 128
    gaps: Gaps = ()

    @property
    def is_static(self) -> bool:
        """True when both arrays are numpy, so that schedules can be computed at trace time."""
        return isinstance(self.indices, np.ndarray) and isinstance(self.counts, np.ndarray)

    @property
    def is_shared(self) -> bool:
        """True when rows and heads share one table."""
        return self.indices.ndim == 2


jax.tree_util.register_dataclass(
    BlockTable,
    data_fields=["indices", "counts"],
    meta_fields=["kv_length", "block_q", "block_k", "gaps"],
)


def validate_blocks(
    blocks: BlockTable, rows: int, heads: int, queries: int, cache_rows: int
) -> None:
    """Raise ValueError when a table does not fit the operands it is used with."""
    nq = ceil_div(queries, blocks.block_q)
    lead = () if blocks.is_shared else (rows, heads)
    if blocks.indices.shape[:-1] != (*lead, nq):
        raise ValueError(
            f"block indices must have shape {(*lead, nq, 'cap')} for {queries} queries in blocks "
            f"of {blocks.block_q}. Got {blocks.indices.shape}. Build the table for this length."
        )
    if blocks.counts.shape != blocks.indices.shape[:-1]:
        raise ValueError(
            f"block counts must have shape {blocks.indices.shape[:-1]}. Got {blocks.counts.shape}."
        )
    if blocks.kv_length > cache_rows:
        raise ValueError(
            f"kv_length {blocks.kv_length} exceeds the cache's {cache_rows} rows. "
            "Pass the number of valid rows."
        )
    if blocks.is_static:
        limit = ceil_div(blocks.kv_length, blocks.block_k)
        if blocks.indices.size and not 0 <= blocks.indices.min() <= blocks.indices.max() < limit:
            raise ValueError(
                f"block indices must lie in [0, {limit}). Got {blocks.indices.min()}.."
                f"{blocks.indices.max()}. Blocks are counted from cache row 0."
            )
        if blocks.counts.size and blocks.counts.max() > blocks.indices.shape[-1]:
            raise ValueError(
                f"block counts must be at most the capacity {blocks.indices.shape[-1]}. "
                f"Got {blocks.counts.max()}."
            )


def blocks_from_mask(
    mask: Bool[np.ndarray, "nq nk"],
    kv_length: int,
    *,
    block_q: int = 128,
    block_k: int = 128,
    gaps: Gaps = (),
) -> BlockTable:
    """Compact a boolean block mask. The block with the ragged tail comes first in every list."""
    nk = ceil_div(kv_length, block_k)
    if mask.shape[1] != nk:
        raise ValueError(
            f"mask must have {nk} columns for kv_length {kv_length} in blocks of {block_k}. "
            f"Got {mask.shape[1]}."
        )
    counts = mask.sum(1).astype(np.int32)
    indices = np.zeros((mask.shape[0], max(int(counts.max(initial=0)), 1)), np.int32)
    for row, kept in enumerate(mask):
        indices[row, : counts[row]] = np.flatnonzero(kept)[::-1]
    return BlockTable(indices, counts, kv_length, block_q, block_k, gaps)


def coarsen(token_mask: Bool[np.ndarray, "T S"], block_q: int, block_k: int) -> np.ndarray:
    """Block mask [nq, nk]: a block is kept when any of its (query, key) pairs is."""
    queries, keys = token_mask.shape
    padded = np.zeros((round_up(queries, block_q), round_up(keys, block_k)), bool)
    padded[:queries, :keys] = token_mask
    tiles = padded.reshape(-1, block_q, padded.shape[1] // block_k, block_k)
    return np.asarray(tiles.any((1, 3)))


@dataclass(frozen=True)
class KeyGrid:
    """One scale in the cache: token (y, x) lives at row `row + y * pitch + x`."""

    height: int
    width: int
    row: int
    pitch: int

    @property
    def end(self) -> int:
        """First row after this grid."""
        return self.row + self.height * self.pitch


@dataclass(frozen=True)
class Geometry:
    """The query grid and every key grid it may look at, in cache order."""

    height: int
    width: int
    keys: tuple[KeyGrid, ...]

    def __post_init__(self) -> None:
        end = 0
        for grid in self.keys:
            if grid.row < end or grid.pitch < grid.width:
                raise ValueError(
                    f"key grids must not overlap and need pitch >= width. Got {grid} after {end}."
                )
            end = grid.end

    @property
    def kv_length(self) -> int:
        """Rows of the cache that the grids span."""
        return self.keys[-1].end

    @property
    def gaps(self) -> Gaps:
        """Row ranges before `kv_length` without a token: between grids, right of short rows."""
        seen = np.zeros(self.kv_length + 1, bool)
        for grid in self.keys:
            rows = seen[grid.row : grid.end].reshape(grid.height, grid.pitch)
            rows[:, : grid.width] = True
        seen[-1] = True
        edges = np.flatnonzero(np.diff(np.concatenate([[True], seen]).astype(np.int8)))
        return tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))

    @classmethod
    def packed(cls, grids: tuple[tuple[int, int], ...]) -> Geometry:
        """Every grid right after its predecessor; the last grid is the query grid."""
        keys, row = [], 0
        for height, width in grids:
            keys.append(KeyGrid(height, width, row, width))
            row += height * width
        return cls(*grids[-1], tuple(keys))

    @classmethod
    def aligned(cls, grids: tuple[tuple[int, int], ...]) -> Geometry:
        """Grids start at multiples of 8 and have a pitch that is a multiple of 8."""
        keys, row = [], 0
        for height, width in grids:
            keys.append(KeyGrid(height, width, row, round_up(width, 8)))
            row = keys[-1].end
        return cls(*grids[-1], tuple(keys))


def window_centres(length: int, key_length: int) -> Int[np.ndarray, " length"]:
    """Key coordinate under each query coordinate: half-even rounding of float32 `q / Sq * Sk`."""
    position = np.arange(length, dtype=np.float32) / np.float32(length) * np.float32(key_length)
    return np.rint(position).astype(np.int64)


def window_bounds(length: int, key_length: int, window: int) -> tuple[np.ndarray, np.ndarray]:
    """First and last visible key coordinate per query coordinate (last < first: none).

    A window of w sees `|centre - key| <= w // 2`; -1 therefore sees nothing. A centre may fall
    outside the grid, which then hides keys, as in the paper's code.
    """
    centre = window_centres(length, key_length)
    low, high = centre - window // 2, centre + window // 2
    return np.maximum(low, 0), np.minimum(high, key_length - 1)


@functools.lru_cache(maxsize=32)
def token_rule(geometry: Geometry, windows: tuple[int, ...], sinks: int) -> np.ndarray:
    """Boolean mask [T, kv_length]: the CSLA token rule. Sinks are the first `sinks` key grids."""
    validate_windows(geometry, windows, sinks)
    mask = np.zeros((geometry.height, geometry.width, geometry.kv_length), bool)
    for number, grid in enumerate(geometry.keys):
        view = mask[:, :, grid.row : grid.end].reshape(
            geometry.height, geometry.width, grid.height, grid.pitch
        )
        if number < sinks:
            view[..., : grid.width] = True
            continue
        rows = _visible(geometry.height, grid.height, windows[number])
        columns = _visible(geometry.width, grid.width, windows[number])
        view[..., : grid.width] = rows[:, None, :, None] & columns[None, :, None, :]
    mask = mask.reshape(-1, geometry.kv_length)
    mask.flags.writeable = False
    return mask


def _visible(length: int, key_length: int, window: int) -> np.ndarray:
    low, high = window_bounds(length, key_length, window)
    key = np.arange(key_length)
    return (key >= low[:, None]) & (key <= high[:, None])


@functools.lru_cache(maxsize=32)
def csla_blocks(
    geometry: Geometry, windows: tuple[int, ...], sinks: int, block_q: int = 128, block_k: int = 128
) -> BlockTable:
    """The token rule coarsened to blocks of raster-ordered tokens (SparVAR, section on CSLA)."""
    mask = coarsen(token_rule(geometry, windows, sinks), block_q, block_k)
    return blocks_from_mask(
        mask, geometry.kv_length, block_q=block_q, block_k=block_k, gaps=geometry.gaps
    )


def dense_blocks(
    queries: int, kv_length: int, *, block_q: int = 128, block_k: int = 128, gaps: Gaps = ()
) -> BlockTable:
    """A table that keeps everything."""
    mask = np.ones((ceil_div(queries, block_q), ceil_div(kv_length, block_k)), bool)
    return blocks_from_mask(mask, kv_length, block_q=block_q, block_k=block_k, gaps=gaps)


def validate_windows(geometry: Geometry, windows: tuple[int, ...], sinks: int) -> None:
    """Raise ValueError when windows do not name every key grid."""
    if len(windows) != len(geometry.keys):
        raise ValueError(
            f"windows must have one entry per key grid, {len(geometry.keys)}. Got {len(windows)}."
        )
    if not 0 <= sinks <= len(geometry.keys):
        raise ValueError(f"sinks must be a number of leading key grids. Got {sinks}.")


def density(blocks: BlockTable, queries: int) -> float:
    """Kept share of the (query, key) pairs of a static table, ragged edges counted exactly."""
    if not blocks.is_static:
        raise ValueError("density needs a static table. Got traced arrays.")
    widths = np.minimum(blocks.block_k, blocks.kv_length - blocks.indices * blocks.block_k)
    slot = np.arange(blocks.indices.shape[-1])
    keys = np.where(slot < blocks.counts[..., None], widths, 0).sum(-1)
    starts = np.arange(blocks.counts.shape[-1]) * blocks.block_q
    heights = np.minimum(blocks.block_q, queries - starts)
    total = (keys * heights).sum(-1) / (queries * blocks.kv_length)
    return float(np.mean(total))
