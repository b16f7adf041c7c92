"""Attention on lists of cache rows: columns that a group of queries chose, rectangles of a patch.

A program has `block_q` queries that share a list, and gathers `block_k` listed rows a step. Rows
that hold no key are not read: they count as zeros and are masked.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.boxes_table import TILE_HEIGHT, TILE_WIDTH
from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable.tuning import TileConfig
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import Gaps

_WORD = 32


def column_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    columns: Int[Array, "R2 H G K"],
    counts: Int[Array, "R2 H G"],
    config: TileConfig,
    softmax: tri.Softmax,
    *,
    kv_length: int,
    group: int,
    granularity: int,
    gaps: Gaps = (),
    interpret: bool = False,
) -> Float[Array, "R2 T H D"]:
    """Every group of queries reads its runs; token-major output."""
    rows, heads, queries, head_dim = q.shape
    parts, capacity = ceil_div(group, config.block_q), columns.shape[3]

    def kernel(q_ref, k_ref, v_ref, columns, counts, out_ref):
        item, number = pl.program_id(1), pl.program_id(0)
        lead = lax.div(item, heads), lax.rem(item, heads)
        mine, part = lax.div(number, parts), lax.rem(number, parts)
        within = part * config.block_q + _iota(config.block_q)
        tokens = mine * group + within
        there = (within < group) & (tokens < queries)
        count = counts[(*lead, mine)]

        def fetch(step):
            place = step * config.block_k + _iota(config.block_k)
            entry = lax.div(place, granularity)
            listed = entry < count
            at = columns.at[(*lead, mine, jnp.minimum(entry, capacity - 1))]
            run = pltriton.load(at, mask=listed, other=0)
            row = run * granularity + lax.rem(place, granularity)
            seen = listed & (row < kv_length)
            for start, stop in gaps:
                seen &= (row < start) | (row >= stop)
            keys, values = (tri.load_rows(x, lead, row, seen) for x in (k_ref, v_ref))
            return keys, values, seen[None]

        own = tri.load_rows(q_ref, lead, tokens, there)
        steps = lax.div(count * granularity + config.block_k - 1, config.block_k)
        running = softmax.start(config.block_q, head_dim)
        out, _ = softmax.finish(tri.walk(softmax, own, running, (0, steps), fetch))
        tri.store_rows(out_ref, (lead[0],), tokens, (lead[1],), there, out)

    grid = (ceil_div(queries, group) * parts, rows * heads)
    out = jax.ShapeDtypeStruct((rows, queries, heads, head_dim), q.dtype)
    return tri.call(kernel, out, grid, config, q, k, v, columns, counts, interpret=interpret)


def window_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    grid: tuple[int, int],
    table: Int[Array, "tiles K"],
    counts: Int[Array, " tiles"],
    words: Int[Array, "tiles W 128"] | None,
    config: TileConfig,
    softmax: tri.Softmax,
    *,
    interpret: bool = False,
) -> Float[Array, "R2 T H D"]:
    """Every patch of the `grid` of queries reads the `counts` first rows of its list.

    words: one bit for every (key, query) of a patch, 32 keys a word; None shows all listed keys to
    all queries of the patch. Token-major output.
    """
    rows, heads, queries, head_dim = q.shape
    height, width = grid
    across, capacity = ceil_div(width, TILE_WIDTH), table.shape[1]
    tiled, parts = TILE_HEIGHT * TILE_WIDTH, ceil_div(TILE_HEIGHT * TILE_WIDTH, config.block_q)

    def kernel(q_ref, k_ref, v_ref, table, counts, *rest):
        *bits, out_ref = rest
        item, number = pl.program_id(1), pl.program_id(0)
        lead = lax.div(item, heads), lax.rem(item, heads)
        tile, part = lax.div(number, parts), lax.rem(number, parts)
        within = part * config.block_q + _iota(config.block_q)
        y = lax.div(tile, across) * TILE_HEIGHT + lax.div(within, TILE_WIDTH)
        x = lax.rem(tile, across) * TILE_WIDTH + lax.rem(within, TILE_WIDTH)
        there, tokens = (y < height) & (x < width) & (within < tiled), y * width + x
        count = counts[tile]

        def fetch(step):
            place = step * config.block_k + _iota(config.block_k)
            seen = place < count
            row = pltriton.load(
                table.at[tile, jnp.minimum(place, capacity - 1)], mask=seen, other=0
            )
            keys, values = (tri.load_rows(x, lead, row, seen) for x in (k_ref, v_ref))
            if not bits:
                return keys, values, seen[None]
            first = step * (config.block_k // _WORD)
            shown = [bits[0].at[tile, first + i, within] for i in range(config.block_k // _WORD)]
            return keys, values, _visible([pltriton.load(word) for word in shown])

        own = tri.load_rows(q_ref, lead, tokens, there)
        steps = lax.div(count + config.block_k - 1, config.block_k)
        running = softmax.start(config.block_q, head_dim)
        out, _ = softmax.finish(tri.walk(softmax, own, running, (0, steps), fetch))
        tri.store_rows(out_ref, (lead[0],), tokens, (lead[1],), there, out)

    given = (table, counts) if words is None else (table, counts, words)
    out = jax.ShapeDtypeStruct((rows, queries, heads, head_dim), q.dtype)
    programs = (table.shape[0] * parts, rows * heads)
    return tri.call(kernel, out, programs, config, q, k, v, *given, interpret=interpret)


def _visible(words: list[Int[Array, " M"]]):
    """Bit i of word w tells of key 32 w + i: [M, 32 * words]."""
    key = _iota(_WORD * len(words))[None, :]
    word = words[0][:, None]
    for number, other in enumerate(words[1:], 1):
        word = jnp.where(key >= number * _WORD, other[:, None], word)
    return lax.shift_right_logical(*jnp.broadcast_arrays(word, key & (_WORD - 1))) & 1 > 0


def _iota(size: int) -> Int[Array, " N"]:
    return jnp.arange(size, dtype=jnp.int32)
