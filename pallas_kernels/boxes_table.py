"""Numpy tables of the boxed windows: which key rows a query patch reads and which of them count.

A query tile is a patch of the grid. Every key grid contributes the rectangle that spans the windows
of the patch's queries; sinks contribute everything. Arrays are made once per geometry and cached.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import Geometry, validate_windows, window_bounds

TILE_HEIGHT, TILE_WIDTH = 8, 16


@dataclass(frozen=True, eq=False)
class TileKeys:
    """Keys of every tile, n tiles of `tile_height` x `tile_width` queries, K keys, G key grids.

    rows: int32 [n, K] cache rows; valid: bool [n, K]; grid, y, x: int32 [n, K] origin of the key;
    low, high: int32 [n, tile, G, 2] visible coordinates (y, x) of every query in every grid.
    """

    tile_height: int
    tile_width: int
    rows: np.ndarray
    valid: np.ndarray
    grid: np.ndarray
    y: np.ndarray
    x: np.ndarray
    low: np.ndarray
    high: np.ndarray

    def arrays(self) -> tuple[np.ndarray, ...]:
        """Everything that varies by tile, in the order the XLA path walks it."""
        return self.rows, self.valid, self.grid, self.y, self.x, self.low, self.high


def tile_queries(geometry: Geometry, tile_height: int, tile_width: int) -> np.ndarray:
    """Raster query index of every tile position, [n, tile]; positions off the grid get T."""
    rows = ceil_div(geometry.height, tile_height) * tile_height
    columns = ceil_div(geometry.width, tile_width) * tile_width
    y, x = np.mgrid[:rows, :columns]
    index = np.where(
        (y < geometry.height) & (x < geometry.width),
        y * geometry.width + x,
        geometry.height * geometry.width,
    )
    tiles = index.reshape(rows // tile_height, tile_height, columns // tile_width, tile_width)
    return tiles.transpose(0, 2, 1, 3).reshape(-1, tile_height * tile_width)


def axis_bounds(length: int, key_length: int, window: int, sink: bool) -> np.ndarray:
    """Visible [low, high] per query coordinate, [length, 2]."""
    if sink:
        return np.tile(np.array([0, key_length - 1]), (length, 1))
    return np.stack(window_bounds(length, key_length, window), -1)


def span(bounds: np.ndarray, tile: int) -> np.ndarray:
    """Union [low, high] over each tile of queries; empty unions give low > high."""
    spans = []
    for start in range(0, len(bounds), tile):
        part = bounds[start : start + tile]
        part = part[part[:, 0] <= part[:, 1]]
        spans.append((part[:, 0].min(), part[:, 1].max()) if len(part) else (0, -1))
    return np.array(spans)


@functools.lru_cache(maxsize=32)
def tile_keys(
    geometry: Geometry,
    windows: tuple[int, ...],
    sinks: int,
    tile_height: int = TILE_HEIGHT,
    tile_width: int = TILE_WIDTH,
) -> TileKeys:
    """Rectangles without rounding: the pairs that `exact=False` keeps in every implementation."""
    validate_windows(geometry, windows, sinks)
    bounds = [
        (
            axis_bounds(geometry.height, grid.height, window, number < sinks),
            axis_bounds(geometry.width, grid.width, window, number < sinks),
        )
        for number, (grid, window) in enumerate(zip(geometry.keys, windows, strict=True))
    ]
    spans = [(span(by, tile_height), span(bx, tile_width)) for by, bx in bounds]
    lists = []
    for ty in range(ceil_div(geometry.height, tile_height)):
        for tx in range(ceil_div(geometry.width, tile_width)):
            lists.append(
                np.concatenate(
                    [
                        _rectangle(number, sy[ty], sx[tx], geometry)
                        for number, (sy, sx) in enumerate(spans)
                    ]
                )
            )
    return _pack(lists, bounds, geometry, tile_height, tile_width)


def _rectangle(number: int, y_span, x_span, geometry: Geometry) -> np.ndarray:
    """[keys, 4]: cache row, grid number, y, x."""
    grid = geometry.keys[number]
    y, x = np.mgrid[y_span[0] : y_span[1] + 1, x_span[0] : x_span[1] + 1].reshape(2, -1)
    return np.stack([grid.row + y * grid.pitch + x, np.full_like(y, number), y, x], -1)


def _pack(lists, bounds, geometry, tile_height, tile_width) -> TileKeys:
    capacity = max(len(item) for item in lists)
    packed = np.zeros((len(lists), capacity, 4), np.int32)
    valid = np.zeros((len(lists), capacity), bool)
    for number, item in enumerate(lists):
        packed[number, : len(item)] = item
        valid[number, : len(item)] = True
    index = tile_queries(geometry, tile_height, tile_width)
    index = np.minimum(index, geometry.height * geometry.width - 1)
    y, x = np.divmod(index, geometry.width)
    limits = np.stack([np.stack([by[y], bx[x]], -2) for by, bx in bounds], 2).astype(np.int32)
    return TileKeys(
        tile_height, tile_width, packed[..., 0], valid, packed[..., 1], packed[..., 2],
        packed[..., 3], limits[..., 0], limits[..., 1],
    )  # fmt: skip


def tile_mask(
    geometry: Geometry, windows: tuple[int, ...], sinks: int
) -> Bool[np.ndarray, "n tile K"]:
    """The token rule for the keys of every tile, [n, tile, K]."""
    table = tile_keys(geometry, windows, sinks)
    axes = []
    for axis, key in enumerate((table.y, table.x)):
        low, high = (
            np.take_along_axis(bound[..., axis], table.grid[:, None, :], 2)
            for bound in (table.low, table.high)
        )
        axes.append((key[:, None] >= low) & (key[:, None] <= high))
    return axes[0] & axes[1] & table.valid[:, None]


@functools.lru_cache(maxsize=32)
def mask_words(
    geometry: Geometry,
    windows: tuple[int, ...],
    sinks: int,
    block_k: int = 64,
    least_stages: int = 1,
) -> np.ndarray:
    """The token rule as one int32 per thread, [n, stages, warpgroups, 128], for stages of 64 keys.

    Thread t of a warpgroup holds, of its 64x64 scores, rows 16 (t // 32) + 8 r + t % 32 // 4 and
    columns 8 j + 2 (t % 4) + e; bit 16 r + 2 j + e of its word tells whether that pair is visible.
    Stages beyond the keys (there are some where `least_stages` asks for more) hide all pairs.
    """
    shown = tile_mask(geometry, windows, sinks)
    tiles, queries, keys = shown.shape
    stages = max(ceil_div(keys, block_k), least_stages)
    mask = np.zeros((tiles, queries, stages * block_k), bool)
    mask[..., :keys] = shown
    # tile, warpgroup, warp, r, lane // 4, stage, j, lane % 4, e
    mask = mask.reshape(tiles, -1, 4, 2, 8, stages, 8, 4, 2)
    bits = mask.transpose(0, 5, 1, 2, 4, 7, 3, 6, 8).reshape(tiles, stages, -1, 128, 32)
    words = (bits.astype(np.uint32) << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return words.view(np.int32)
