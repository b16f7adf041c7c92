"""Sparse attention as many short dense problems: a tile of queries, and the keys it reads.

The listed rows of every tile are copied into compact arrays, and one call of cuDNN takes all tiles
of about as many keys, each with its own number of them. Copying costs as much memory traffic as the
lists are long; the products are those of the kept pairs alone. Rows without keys are never copied,
so that nothing they hold reaches a result.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.selection import compact, prefix_counts
from pallas_kernels.shapes import ceil_div, round_up

# Copied keys and values of one call, in bytes: large enough to fill a GPU, small beside its memory.
_PIECE = 1 << 30
_CLASSES = 4  # of lengths, so that short lists are not copied as long as the longest


def attend(
    q: Float[Array, "B T N D"],
    k: Float[Array, "B S N D"],
    v: Float[Array, "B S N D"],
    scale: float,
    lengths: Int[Array, " B"] | None = None,
) -> Float[Array, "B T N D"]:
    """Dense attention of every problem over its first `lengths` keys (all of them by default)."""
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def attend_static(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    index: Int[np.ndarray, "n tile"],
    lists: tuple[Int[np.ndarray, " _"], ...],
    scale: float,
) -> Float[Array, "R2 H T D"]:
    """Tiles of queries by number (T for none), each with its list of cache rows, known at trace."""
    rows, heads, queries, head_dim = q.shape
    padded = jnp.pad(q, ((0, 0), (0, 0), (0, 1), (0, 0)))
    outs, places = [], []
    key_bytes = 2 * rows * heads * head_dim * k.dtype.itemsize
    for members, table, counts in _classes(lists, key_bytes):
        tiles = padded[:, :, index[members]]
        out = _problems(tiles, k, v, jnp.asarray(table), jnp.asarray(counts), scale)
        outs.append(out.reshape(rows, heads, -1, head_dim))
        places.append(index[members].reshape(-1))
    order = np.argsort(np.concatenate(places), kind="stable")[:queries]
    return jnp.concatenate(outs, 2)[:, :, order]


def attend_traced(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    tile: int,
    listed: Int[Array, "R2 H n K"],
    keep: Bool[Array, "R2 H n K"],
    scale: float,
) -> Float[Array, "R2 H T D"]:
    """Every `tile` consecutive queries read those `listed` cache rows that `keep` says."""
    rows, heads, queries, head_dim = q.shape
    number = listed.shape[2]
    q = jnp.pad(q, ((0, 0), (0, 0), (0, number * tile - queries), (0, 0)))
    tiles = q.reshape(rows, heads, number, tile, head_dim)
    table, counts = _in_front(listed, keep)
    pieces = ceil_div(2 * k.dtype.itemsize * table.size * head_dim, _PIECE)
    step = ceil_div(number, min(pieces, number))
    parts = (slice(start, start + step) for start in range(0, number, step))
    out = jnp.concatenate(
        [_problems(tiles[:, :, p], k, v, table[:, :, p], counts[:, :, p], scale) for p in parts], 2
    )
    return out.reshape(rows, heads, -1, head_dim)[:, :, :queries]


def _problems(tiles, k, v, table, counts, scale: float) -> Float[Array, "R H n tile D"]:
    """One problem a tile: [R, H, n, tile, D] against the first `counts` rows of its list."""
    rows, heads, number = tiles.shape[:3]
    if table.ndim == 2:  # one list for all rows and heads
        take = functools.partial(jnp.take, indices=table, axis=2, mode="clip")
    else:
        each = jax.vmap(jax.vmap(lambda x, at: jnp.take(x, at, axis=0, mode="clip")))
        take = functools.partial(each, at=table)
    counts = jnp.broadcast_to(counts, (rows, heads, number))
    # A call needs one key at least; what it gives where there is none is replaced.
    lengths = jnp.maximum(counts.reshape(-1), 1).astype(jnp.int32)
    q, keys, values = (
        x.reshape(rows * heads * number, -1, 1, x.shape[-1])
        for x in (tiles, take(k[:rows]), take(v[:rows]))
    )
    out = attend(q, keys, values, scale, lengths).reshape(tiles.shape)
    return jnp.where((counts > 0)[..., None, None], out, 0)


def _classes(
    lists: tuple[Int[np.ndarray, " _"], ...], key_bytes: int
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Tiles with about as many keys: their numbers, padded lists, and how long those are."""
    counts = np.array([len(rows) for rows in lists], np.int32)
    step = round_up(ceil_div(max(int(counts.max(initial=1)), 1), _CLASSES), 8)
    kinds = -(-counts // step)
    for kind in np.unique(kinds):
        alike = np.flatnonzero(kinds == kind)
        width = round_up(max(int(counts[alike].max()), 1), 8)
        pieces = ceil_div(len(alike) * width * key_bytes, _PIECE)
        for members in np.array_split(alike, min(pieces, len(alike))):
            table = np.zeros((len(members), width), np.int32)
            for number, member in enumerate(members):
                table[number] = lists[member][0] if len(lists[member]) else 0
                table[number, : counts[member]] = lists[member]
            yield members, table, counts[members]


def _in_front(
    listed: Int[Array, "R H n K"], keep: Bool[Array, "R H n K"]
) -> tuple[Int[Array, "R H n K"], Int[Array, "R H n"]]:
    """Kept entries in front, in their order, and how many there are; behind them is the first."""
    shape, capacity = listed.shape, listed.shape[-1]
    flags = jnp.pad(keep.reshape(-1, capacity), ((0, 0), (0, -capacity % 128)))
    entries = compact(flags, prefix_counts(flags) - 1, capacity)
    counts = keep.sum(-1, dtype=jnp.int32)
    entries = jnp.where(jnp.arange(capacity) < counts.reshape(-1, 1), entries, entries[:, :1])
    front = jnp.take_along_axis(listed.reshape(-1, capacity), entries, 1)
    return front.reshape(shape), counts
