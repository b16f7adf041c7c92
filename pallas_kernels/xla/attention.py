"""XLA formulations: they run everywhere, and their work and memory shrink with density.

Scores are accumulated in float32. Large problems are cut into pieces that `jax.lax.map` walks: no
array of the size [H, T, S] exists in a sparse path, and the dense one fits a small memory.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.boxes_table import tile_keys, tile_queries
from pallas_kernels.shapes import ceil_div, round_up
from pallas_kernels.sparsity import BlockTable, Gaps, Geometry, visible_rows

_MAX_SCORES = 1 << 25


def softmax_attention(
    q: Float[Array, "*n T D"],
    k: Float[Array, "*n S D"],
    v: Float[Array, "*n S D"],
    mask: Bool[Array, "*#n #T S"] | None,
    scale: float,
) -> tuple[Float[Array, "*n T D"], Float[Array, "*n T"]]:
    """Attention of one piece with float32 accumulation; empty rows give zeros and -inf."""
    precision = "highest" if q.dtype == jnp.float32 else None
    dot = functools.partial(jnp.einsum, precision=precision, preferred_element_type=jnp.float32)
    scores = dot("...td,...sd->...ts", q, k) * scale
    if mask is not None:
        scores = jnp.where(mask, scores, -jnp.inf)
    top = jax.lax.stop_gradient(scores.max(-1, keepdims=True))
    weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
    total = weights.sum(-1, keepdims=True)
    out = dot("...ts,...sd->...td", weights.astype(v.dtype), v)
    out = out / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)
    return out.astype(q.dtype), (jnp.log(total) + top)[..., 0]


def _tiles(x: Float[Array, "R H T D"], size: int) -> Float[Array, "n R H size D"]:
    """Cut the query axis into tiles, the last one padded with zeros."""
    rows, heads, length, depth = x.shape
    count = ceil_div(length, size)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
    return jnp.moveaxis(x.reshape(rows, heads, count, size, depth), 2, 0)


def _join(x: Array, length: int) -> Array:
    """Undo `_tiles` for [n, R, H, size, ...]."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])[:, :, :length]


def attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    kv_length: int,
    *,
    gaps: Gaps = (),
    scale: float = 1.0,
) -> tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]:
    """Dense attention and its log-sum-exp; large problems by row, and by query tile within one.

    So a tile is as long in a large batch as in a small one, and a row's result is the same in both.
    """
    rows, heads, queries, _ = q.shape
    k, v = k[:rows, :, :kv_length], v[:rows, :, :kv_length]
    mask = None
    if gaps:
        mask = jnp.asarray(visible_rows(kv_length, kv_length, gaps))[None]
        v = jnp.where(mask[0][:, None], v, 0)
    if rows * heads * queries * kv_length <= _MAX_SCORES:
        return softmax_attention(q, k, v, mask, scale)
    size = max(64, min(queries, _MAX_SCORES // (heads * kv_length) // 64 * 64))

    def one_row(row: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        q, k, v = (x[None] for x in row)
        run = functools.partial(softmax_attention, k=k, v=v, mask=mask, scale=scale)
        out, lse = jax.lax.map(run, _tiles(q, size))
        return _join(out, queries)[0], _join(lse, queries)[0]

    return jax.lax.map(one_row, (q, k, v))


def block_sparse_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    blocks: BlockTable,
    *,
    scale: float = 1.0,
) -> tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]:
    """Gather the kept key blocks of one query block at a time.

    A static shared table is walked in classes of similar counts, so short lists do short work.
    """
    rows, heads, queries, _ = q.shape
    pad = round_up(blocks.kv_length, blocks.block_k)
    keys, values = (_block_view(x[:rows], pad, blocks.block_k) for x in (k, v))
    tiles = _tiles(q, blocks.block_q)
    if blocks.is_static and blocks.is_shared:
        out, lse = _by_class(tiles, keys, values, blocks, scale)
    else:
        indices, counts = (
            jnp.moveaxis(jnp.broadcast_to(a, (rows, heads, *a.shape[-n:])), 2, 0)
            for a, n in ((blocks.indices[..., :], 2), (blocks.counts, 1))
        )
        run = functools.partial(_one_block, keys=keys, values=values, blocks=blocks, scale=scale)
        out, lse = jax.lax.map(lambda x: run(*x), (tiles, indices, counts))
    return _join(out, queries), _join(lse, queries)


def _block_view(x: Float[Array, "R H S D"], rows: int, block: int) -> Float[Array, "R H n b D"]:
    """The first `rows` cache rows cut into blocks (padded when the cache is shorter)."""
    x = x[:, :, :rows]
    x = jnp.pad(x, ((0, 0), (0, 0), (0, rows - x.shape[2]), (0, 0)))
    return x.reshape(*x.shape[:2], -1, block, x.shape[-1])


def _by_class(tiles, keys, values, blocks: BlockTable, scale: float):
    counts = np.asarray(blocks.counts)
    classes = np.maximum(4, -(-counts // 4) * 4)
    order, outs, lses = [], [], []
    rows, heads = tiles.shape[1:3]
    for size in np.unique(classes):
        members = np.flatnonzero(classes == size)
        order.append(members)
        capacity = min(int(size), blocks.indices.shape[1])
        lead = (len(members), rows, heads)
        indices = np.broadcast_to(
            np.asarray(blocks.indices)[members, None, None, :capacity], (*lead, capacity)
        )
        kept = np.broadcast_to(counts[members, None, None], lead)
        run = functools.partial(_one_block, keys=keys, values=values, blocks=blocks, scale=scale)
        out, lse = jax.lax.map(lambda x, run=run: run(*x), (tiles[members], indices, kept))
        outs.append(out)
        lses.append(lse)
    inverse = np.argsort(np.concatenate(order))
    return jnp.concatenate(outs)[inverse], jnp.concatenate(lses)[inverse]


def _one_block(q, indices, counts, *, keys, values, blocks: BlockTable, scale: float):
    """One query block [R, H, block_q, D] against its list [R, H, cap]."""
    take = jax.vmap(jax.vmap(lambda x, at: x[at].reshape(-1, x.shape[-1])))
    offsets = indices[..., None] * blocks.block_k + jnp.arange(blocks.block_k)
    seen = (jnp.arange(indices.shape[-1]) < counts[..., None])[..., None]
    rows = keys.shape[2] * blocks.block_k
    visible = jnp.asarray(visible_rows(rows, blocks.kv_length, blocks.gaps))
    mask = (seen & visible[offsets]).reshape(*indices.shape[:2], -1)
    k, v = take(keys, indices), take(values, indices)
    v = jnp.where(mask[..., None], v, 0)  # rows past the valid length may hold NaN
    return softmax_attention(q, k, v, mask[:, :, None], scale)


def window_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    geometry: Geometry,
    windows: tuple[int, ...],
    sinks: int,
    *,
    exact: bool,
    scale: float = 1.0,
) -> Float[Array, "R2 H T D"]:
    """Gather, for every query patch, the rectangles its windows span; mask inside when exact."""
    rows = q.shape[0]
    table = tile_keys(geometry, windows, sinks)
    index = tile_queries(geometry, table.tile_height, table.tile_width)
    queries = jnp.pad(q, ((0, 0), (0, 0), (0, 1), (0, 0)))[:, :, index]

    def one(args):
        tile, at, valid, scale_of, y, x, low, high = args
        mask = valid[None]
        if exact:
            y_low, x_low = low[:, :, 0][:, scale_of], low[:, :, 1][:, scale_of]
            y_high, x_high = high[:, :, 0][:, scale_of], high[:, :, 1][:, scale_of]
            mask = mask & (y >= y_low) & (y <= y_high) & (x >= x_low) & (x <= x_high)
        gathered = k[:rows, :, at], jnp.where(valid[:, None], v[:rows, :, at], 0)
        return softmax_attention(tile, *gathered, mask, scale)[0]

    out = jax.lax.map(one, (jnp.moveaxis(queries, 2, 0), *table.arrays()))
    out = jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], -1, q.shape[-1])
    return out[:, :, np.argsort(index.reshape(-1), kind="stable")[: q.shape[2]]]


def column_sums(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    lse: Float[Array, "R2 H T"],
    kv_length: int,
    group: int,
    *,
    gaps: Gaps = (),
    scale: float = 1.0,
) -> Float[Array, "R2 H G S2"]:
    """Attention mass every key receives from each group of `group` queries, from a known lse."""
    keys = k[: q.shape[0], :, :kv_length]
    tiles = _tiles(q, group)
    pad = tiles.shape[0] * group - q.shape[2]
    padded = jnp.pad(lse, ((0, 0), (0, 0), (0, pad)), constant_values=jnp.inf)
    lses = jnp.moveaxis(padded.reshape(*lse.shape[:2], -1, group), 2, 0)

    seen = jnp.asarray(visible_rows(kv_length, kv_length, gaps))

    def one(args):
        tile, tile_lse = args
        precision = "highest" if q.dtype == jnp.float32 else None
        scores = jnp.einsum(
            "rhtd,rhsd->rhts", tile, keys, precision=precision, preferred_element_type=jnp.float32
        )
        return jnp.where(seen, jnp.exp(scores * scale - tile_lse[..., None]).sum(2), 0.0)

    return jnp.moveaxis(jax.lax.map(one, (tiles, lses)), 0, 2)


def column_sparse_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    columns: Int[Array, "R2 H G K"],
    counts: Int[Array, "R2 H G"],
    *,
    kv_length: int,
    group: int,
    granularity: int,
    gaps: Gaps = (),
    scale: float = 1.0,
) -> Float[Array, "R2 H T D"]:
    """Gather the listed keys of one query group at a time."""
    rows, _, queries, _ = q.shape
    k, v = k[:rows], v[:rows]
    take = jax.vmap(jax.vmap(lambda x, at: x[at]))
    visible = jnp.asarray(visible_rows(round_up(k.shape[2], granularity), kv_length, gaps))

    def one(args):
        tile, units, kept = args
        at = (units[..., None] * granularity + jnp.arange(granularity)).reshape(
            *units.shape[:2], -1
        )
        seen = jnp.arange(at.shape[-1]) < kept[..., None] * granularity
        mask = seen & visible[at]
        at = jnp.where(mask, at, 0)
        values = jnp.where(mask[..., None], take(v, at), 0)
        return softmax_attention(tile, take(k, at), values, mask[:, :, None], scale)[0]

    lists = jnp.moveaxis(columns, 2, 0), jnp.moveaxis(counts, 2, 0)
    return _join(jax.lax.map(one, (_tiles(q, group), *lists)), queries)
