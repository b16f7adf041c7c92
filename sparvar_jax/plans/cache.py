"""The key/value cache: one pair of heads-major buffers a layer, written by static slices."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparvar_jax.plans.schedule import Layout, Slot

LayerCache = tuple[jax.Array, jax.Array]
"""Keys and values of one layer, each [R, H, S, D] with S allocated rows."""

Write = Callable[[jax.Array, jax.Array, Slot], tuple[jax.Array, jax.Array, jax.Array]]
"""(key buffer, value buffer, slot) -> this scale's queries [R, H, T, D] and the updated buffers."""

Attend = Callable[[Write], jax.Array]
"""What self-attention calls: cache and strategy are inside, the output is [R, H, T, D]."""


def allocate(
    layers: int, rows: int, heads: int, head_dim: int, layout: Layout, dtype: jnp.dtype
) -> tuple[LayerCache, ...]:
    """Zeroed cache buffers for every layer: [rows, heads, layout.total, head_dim]."""
    shape = (rows, heads, layout.total, head_dim)
    return tuple((jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(layers))


def write(
    cache: Float[Array, "Rk H S D"], new: Float[Array, "R H T D"], slot: Slot
) -> Float[Array, "Rk H S D"]:
    """The buffer with one scale written to its first R rows.

    Grid rows are padded with zeros up to the slot's pitch, and `slot.clear` rows after the grid are
    zeroed. Callers donate the buffer, so that the update happens in place.
    """
    new = new.astype(cache.dtype)
    if slot.pitch != slot.width:
        rows, heads, tokens, head_dim = new.shape
        grid = new.reshape(rows, heads, tokens // slot.width, slot.width, head_dim)
        grid = jnp.pad(grid, ((0, 0),) * 3 + ((0, slot.pitch - slot.width), (0, 0)))
        new = grid.reshape(rows, heads, -1, head_dim)
    if slot.clear:
        new = jnp.pad(new, ((0, 0),) * 2 + ((0, slot.clear), (0, 0)))
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, slot.start, 0))
