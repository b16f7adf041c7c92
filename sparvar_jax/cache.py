"""The key/value cache: one pair of heads-major buffers a layer, written by static slices."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparvar_jax.schedule import Layout

LayerCache = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each [R, H, S, D] with S allocated rows."""


def allocate(
    layers: int, rows: int, heads: int, head_dim: int, layout: Layout, dtype: jnp.dtype
) -> tuple[LayerCache, ...]:
    """Zeroed cache buffers for every layer: [rows, heads, layout.total, head_dim]."""
    shape = (rows, heads, layout.total, head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def write(
    cache: Float[Array, "Rk H S D"], new: Float[Array, "R H T D"], layout: Layout, scale: int
) -> Float[Array, "Rk H S D"]:
    """The buffer with one scale written to its first R rows.

    Grid rows are padded with zeros up to the layout's pitch. Callers donate the buffer, so that the
    update happens in place.
    """
    height, width = layout.sizes[scale]
    pitch = layout.pitches[scale]
    rows, heads, _, head_dim = new.shape
    new = new.astype(cache.dtype)
    if pitch != width:
        grid = new.reshape(rows, heads, height, width, head_dim)
        grid = jnp.pad(grid, ((0, 0), (0, 0), (0, 0), (0, pitch - width), (0, 0)))
        new = grid.reshape(rows, heads, height * pitch, head_dim)
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, layout.starts[scale], 0))
