"""Wrapper of the block-list kernel: tables, hidden rows and the work order, then the call."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.hopper._mosaic import Softmax, heads_major, pad_rows
from pallas_kernels.hopper.block_list import BlockListInputs, block_list_attention
from pallas_kernels.hopper.schedule import balanced_order, strided_order
from pallas_kernels.hopper.tuning import BlockListConfig
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import BlockTable, visible_rows
from pallas_kernels.support import MULTIPROCESSORS


def attend_blocks(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    blocks: BlockTable,
    config: BlockListConfig,
    *,
    scale: float = 1.0,
    logit_bound: float | None = None,
    hidden_finite: bool = False,
    ctas: int = MULTIPROCESSORS,
) -> tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]:
    """Attention over a block table whose block sizes are those of `config`, and its lse.

    hidden_finite: rows of v without tokens, up to the end of the last block, hold finite numbers.
    """
    rows, heads, queries, head_dim = q.shape
    n = rows * heads
    flat_k, flat_v = (x.reshape(-1, *x.shape[2:]) for x in (k, v))
    keep, slots = _hidden_blocks(blocks)
    patched = None if hidden_finite else _patch(flat_v[:n], blocks, keep, slots)
    indices, specials = _specials_first(blocks, slots)
    items = n * ceil_div(queries, config.block_q)
    if blocks.is_static:
        work = np.resize(np.maximum(np.asarray(blocks.counts).reshape(-1), 1), items)
        order, lengths = balanced_order(work, min(ctas, items))
    else:
        order, lengths = strided_order(items, min(ctas, items))
    inputs = BlockListInputs(
        q=pad_rows(q.reshape(n, queries, head_dim)),
        k=flat_k,
        v=flat_v,
        keep=jnp.asarray(keep, jnp.float32),
        indices=jnp.asarray(indices, jnp.int32).reshape(-1, indices.shape[-1]),
        counts=jnp.asarray(blocks.counts, jnp.int32).reshape(-1),
        specials=jnp.asarray(specials, jnp.int32).reshape(-1),
        order=jnp.asarray(order),
        lengths=jnp.asarray(lengths),
        patch=patched,
        slots=None if patched is None else jnp.asarray(np.maximum(slots, 0), jnp.int32),
    )
    softmax = Softmax.bounded(scale, logit_bound, q.dtype)
    out, lse = block_list_attention(inputs, config, softmax, heads)
    return heads_major(out[:, :queries], heads), lse[:, :queries].reshape(rows, heads, queries)


def _hidden_blocks(blocks: BlockTable) -> tuple[np.ndarray, np.ndarray]:
    """Visibility of every key, and a number for every block with hidden rows (-1: none)."""
    size = blocks.block_k
    count = ceil_div(blocks.kv_length, size)
    keep = visible_rows(count * size, blocks.kv_length, blocks.gaps)
    hidden = np.flatnonzero(~keep.reshape(count, size).all(1))
    slots = np.full(count, -1)
    slots[hidden] = np.arange(len(hidden))
    return keep, slots


def _patch(
    v: Float[Array, "n S D"], blocks: BlockTable, keep: np.ndarray, slots: np.ndarray
) -> Float[Array, "n P D"]:
    """Values of the blocks with hidden rows, zero there: a weight of zero times NaN is NaN."""
    size, pieces = blocks.block_k, []
    for block in np.flatnonzero(slots >= 0):
        rows = slice(int(block) * size, min(int(block + 1) * size, v.shape[1]))
        piece = jnp.where(keep[rows][:, None], v[:, rows], 0)
        pieces.append(jnp.pad(piece, ((0, 0), (0, size - piece.shape[1]), (0, 0))))
    return jnp.concatenate(pieces, 1) if pieces else jnp.zeros((1, size, v.shape[2]), v.dtype)


def _specials_first(blocks: BlockTable, slots: np.ndarray):
    """Lists with the blocks that have hidden rows in front, and how many those are (at least one
    step is masked for a list of length zero, which hides everything)."""
    xp: Any = np if blocks.is_static else jnp
    position = xp.arange(blocks.indices.shape[-1])
    used = position < xp.asarray(blocks.counts)[..., None]
    special = (xp.asarray(slots)[blocks.indices] >= 0) & used
    number = special.sum(-1)
    if (slots >= 0).any():
        order = xp.argsort(xp.where(special, position, position + position.size), -1)
        indices = xp.take_along_axis(xp.asarray(blocks.indices), order, -1)
    else:
        indices = blocks.indices
    return indices, xp.where(blocks.counts == 0, 1, number)
