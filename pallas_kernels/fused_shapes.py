"""What the fused operations, their kernels and their references have in common."""

from __future__ import annotations

import math
from dataclasses import dataclass

import jax
from jaxtyping import Array, Float

EPSILON = 1e-6
MAX_LOG_TEMPERATURE = math.log(100.0)

Vector = tuple[Float[Array, "R2 K C"], int]
"""A table whose leading size is 1 or at least R, and which of its K vectors is meant."""

VectorLike = jax.Array | tuple[jax.Array, int]
"""A vector [C], one per row [R, C], or (table [R, K, C], k): row k of the table, read in place."""


@dataclass(frozen=True)
class Rows:
    """Cache rows of one scale: grid row y, column x lives at `start + y * pitch + x`.

    clear: rows after them that are zeroed as well.
    """

    start: int
    pitch: int
    width: int
    height: int
    clear: int = 0

    @property
    def span(self) -> int:
        """Cache rows of the scale, padding included."""
        return self.height * self.pitch


def as_vector(name: str, value: VectorLike, rows: int, width: int) -> Vector:
    """Any accepted form as a table and an index; ValueError for a shape that does not fit."""
    table, index = value if isinstance(value, tuple) else (value, 0)
    if not isinstance(value, tuple):
        table = table[None, None] if table.ndim == 1 else table[:, None]
    fits = table.ndim == 3 and table.shape[2] == width and (len(table) == 1 or len(table) >= rows)
    if not fits or not 0 <= index < table.shape[1]:
        raise ValueError(
            f"{name} must be [C], [R, C] or (table [R, K, C], index), R >= {rows}, C {width}. "
            f"Got shape {table.shape} and index {index}."
        )
    return table, index
