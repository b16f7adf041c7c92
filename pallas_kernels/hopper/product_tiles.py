"""How Hopper's products are cut into tiles: what is chosen before a kernel is built."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp

from pallas_kernels.shapes import ceil_div
from pallas_kernels.xla.quantised import BLOCK, LARGEST

TILE_ROWS = 128
"""Of a tile of two 8-bit operands."""
HALF = 128
"""Columns that its epilogue takes at a time: such a tile has one half or two."""


@dataclass(frozen=True, kw_only=True)
class MatmulConfig:
    """stages: of both operands in shared memory. snake: tiles across before the walk turns.

    columns: of a tile, 256 or 128. along: which tile coordinate changes first, 0 for rows and 1 for
    columns.
    """

    stages: int = 4
    snake: int = 8
    along: int = 0
    columns: int = 2 * HALF


def matmul_config(rows: int, outputs: int, dtype: jnp.dtype, ctas: int) -> MatmulConfig:
    """Narrow tiles where wide ones leave half of the multiprocessors without work.

    They also serve outputs that are no multiple of 256. 8-bit results have scales of 256 columns
    and take wide tiles.
    """
    tiles = ceil_div(rows, TILE_ROWS) * ceil_div(outputs, BLOCK)
    if dtype not in LARGEST and (outputs % BLOCK or 2 * tiles <= ctas):
        return MatmulConfig(stages=6, columns=HALF)
    return MatmulConfig()


DEPTHS = 64, 128
"""Inputs of a stage where weights of 8 bits meet few rows: a stage costs a wait, so that fewer and
deeper ones are better while several still fit."""
OUTPUTS = 64
"""Of a warpgroup."""
WIDEST = 256
"""Rows of one WGMMA, as its right operand."""
MOST_ROWS = 320
"""Of a tile: more sums than these leave no registers for weights."""
LEFT = 16
"""Rows that leave a tile at once: tiles have a multiple of them, or 8 rows in all."""
DEEP_ROWS = 128
"""Of a tile with deep stages at most."""
FOUR_ROWS = 80
"""Of a tile with four consumers at most."""
FIXED_INPUTS, INPUTS_A_ROW = 256, 8
"""What a tile costs besides its inputs, in inputs: the first stage's way, and so many for a row,
whose sums are written and read again."""
MOST_PARTS = 9


class Tile(NamedTuple):
    """Rows of a tile: so many groups, a WGMMA each, of so many rows; and tiles across all rows.

    consumers: warpgroups that own 64 outputs each.
    """

    groups: int
    rows: int
    across: int
    consumers: int

    @classmethod
    def of(cls, rows: int, outputs: int) -> Tile:
        """As few tiles as hold all rows."""
        across = ceil_div(rows, MOST_ROWS)
        each = ceil_div(rows, across)
        groups = ceil_div(each, WIDEST)
        step = LEFT if rows > 8 else 8
        together = step * ceil_div(ceil_div(each, groups), step)
        wide = together <= FOUR_ROWS and outputs % (4 * OUTPUTS) == 0
        return cls(groups, together, across, 4 if wide else 2)

    @property
    def height(self) -> int:
        """Rows of all groups."""
        return self.groups * self.rows

    @property
    def depth(self) -> int:
        """Inputs of a stage."""
        return DEPTHS[self.height <= DEEP_ROWS]

    @property
    def outputs(self) -> int:
        """Of all consumers."""
        return OUTPUTS * self.consumers


def parts_of(tiles: int, inputs: int, tile: Tile, ctas: int) -> int:
    """Into how many parts the inputs go, so that all multiprocessors are done soonest.

    No part is empty: with as many steps a part, fewer parts cost less.
    """
    steps, fixed = inputs // tile.depth, FIXED_INPUTS + INPUTS_A_ROW * tile.height

    def cost(parts: int) -> int:
        return ceil_div(tiles * parts, ctas) * (ceil_div(steps, parts) * tile.depth + fixed)

    return min(range(1, min(MOST_PARTS, steps) + 1), key=cost)
