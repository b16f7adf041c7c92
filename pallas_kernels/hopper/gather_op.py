"""Wrappers of the gather kernel: column-sparse attention and boxed windows."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels.boxes_table import TILE_HEIGHT, TILE_WIDTH, mask_words, tile_keys
from pallas_kernels.hopper._mosaic import Softmax, heads_major, pad_rows
from pallas_kernels.hopper.gather import GatherInputs, Patches, gather_attention
from pallas_kernels.hopper.schedule import balanced_order, strided_order
from pallas_kernels.hopper.tuning import GatherConfig
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import Gaps, Geometry
from pallas_kernels.support import MULTIPROCESSORS


def attend_columns(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    columns: Int[Array, "R2 H G K"],
    counts: Int[Array, "R2 H G"],
    config: GatherConfig,
    *,
    kv_length: int,
    granularity: int,
    gaps: Gaps = (),
    scale: float = 1.0,
    logit_bound: float | None = None,
    ctas: int = MULTIPROCESSORS,
) -> Float[Array, "R2 H T D"]:
    """Column-sparse attention; the group must be `config.block_q` queries."""
    rows, heads, queries, head_dim = q.shape
    n, tiles = rows * heads, ceil_div(queries, config.block_q)
    items = n * tiles
    order, lengths = strided_order(items, min(ctas, items))
    inputs = GatherInputs(
        q=pad_rows(q.reshape(n, queries, head_dim)),
        k=k.reshape(-1, *k.shape[2:]),
        v=v.reshape(-1, *v.shape[2:]),
        lists=columns.astype(jnp.int32).reshape(items, -1),
        counts=(counts * granularity).astype(jnp.int32).reshape(items),
        order=jnp.asarray(order),
        lengths=jnp.asarray(lengths),
    )
    softmax = Softmax.bounded(scale, logit_bound, q.dtype)
    hidden = (*gaps, (kv_length, 1 << 30))
    out = gather_attention(
        inputs, config, softmax, heads=heads, tiles=tiles, granularity=granularity, hidden=hidden,
        patches=None,
    )  # fmt: skip
    return heads_major(out[:, :queries], heads)


@functools.lru_cache(maxsize=32)
def window_lists(
    geometry: Geometry, windows: tuple[int, ...], sinks: int
) -> tuple[np.ndarray, np.ndarray]:
    """Cache rows of every patch in reading order (padded with row 0) and their numbers."""
    table = tile_keys(geometry, windows, sinks)
    return np.where(table.valid, table.rows, 0), table.valid.sum(1).astype(np.int32)


def attend_windows(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    geometry: Geometry,
    windows: tuple[int, ...],
    sinks: int,
    config: GatherConfig,
    *,
    exact: bool = False,
    scale: float = 1.0,
    logit_bound: float | None = None,
    ctas: int = MULTIPROCESSORS,
) -> Float[Array, "R2 H T D"]:
    """Boxed windows; needs two consumer warpgroups (128 queries a patch), 64 keys when exact."""
    rows, heads, _, head_dim = q.shape
    n = rows * heads
    lists, counts = window_lists(geometry, windows, sinks)
    least = config.least_stages
    stages = np.maximum(-(-counts // config.block_k), least)
    items = n * len(counts)
    ctas = min(ctas, items)
    order, lengths = balanced_order(np.resize(stages, items), ctas)
    inputs = GatherInputs(
        q=pad_rows(q.reshape(n * geometry.height, geometry.width, head_dim)),
        k=k.reshape(-1, *k.shape[2:]),
        v=v.reshape(-1, *v.shape[2:]),
        lists=jnp.asarray(lists),
        counts=jnp.asarray(counts),
        order=jnp.asarray(order),
        lengths=jnp.asarray(lengths),
        words=jnp.asarray(mask_words(geometry, windows, sinks, least_stages=least))
        if exact
        else None,
    )
    across = ceil_div(geometry.width, TILE_WIDTH)
    softmax = Softmax.bounded(scale, logit_bound, q.dtype)
    patches = Patches(TILE_HEIGHT, TILE_WIDTH, across, geometry.height)
    out = gather_attention(
        inputs, config, softmax, heads=heads, tiles=len(counts), granularity=1, hidden=(),
        patches=patches,
    )  # fmt: skip
    out = out[:, : geometry.width].reshape(rows, -1, heads * head_dim)
    return heads_major(out, heads)
