"""From the calls of the public operations to the kernels: tables, lists, layouts of results."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from pallas_kernels import calls
from pallas_kernels.boxes_table import tile_keys, tile_mask
from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable import block_list, gather
from pallas_kernels.portable import column_sums as sums
from pallas_kernels.portable.threshold import row_thresholds
from pallas_kernels.portable.tuning import TileConfig
from pallas_kernels.selection import select_top
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import BlockTable, dense_blocks, visible_rows

Attended = Float[Array, "R2 H T D"] | tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]


def _softmax(call: Any) -> tri.Softmax:
    return tri.Softmax.bounded(call.scale, call.logit_bound, call.q.dtype)


def _heads_first(out: Float[Array, "R T H D"]) -> Float[Array, "R H T D"]:
    """A caller that merges heads again undoes the transpose, and XLA drops the pair."""
    return out.swapaxes(1, 2)


def attend(call: calls.Attention, config: TileConfig, *, interpret: bool = False) -> Attended:
    """Dense attention; with gaps, a list of all blocks."""
    if call.gaps:
        blocks = dense_blocks(
            call.q.shape[2], call.kv_length, block_q=config.block_q, block_k=config.block_k,
            gaps=call.gaps,
        )  # fmt: skip
        return attend_blocks(call, blocks, config, interpret=interpret)
    out, lse = block_list.dense_attention(
        call.q, call.k, call.v, call.kv_length, config, _softmax(call), interpret=interpret
    )
    return (_heads_first(out), lse) if call.return_lse else _heads_first(out)


def attend_blocks(
    call: calls.Attention | calls.BlockSparseAttention,
    blocks: BlockTable,
    config: TileConfig,
    *,
    interpret: bool = False,
) -> Attended:
    """Attention over a table of blocks, of which `config` may take parts a step."""
    out, lse = block_list.block_list_attention(
        call.q, call.k, call.v, block_lists(blocks, call.q.shape[2], config), config,
        _softmax(call), interpret=interpret,
    )  # fmt: skip
    return (_heads_first(out), lse) if call.return_lse else _heads_first(out)


def block_lists(blocks: BlockTable, queries: int, config: TileConfig) -> block_list.BlockLists:
    """Lists in steps of `config.block_k` keys for tiles of `config.block_q` queries."""
    xp: Any = np if blocks.is_static else jnp
    tiles = ceil_div(queries, config.block_q)
    indices, counts = xp.asarray(blocks.indices), xp.asarray(blocks.counts)
    keep = visible_rows(
        ceil_div(blocks.kv_length, blocks.block_k) * blocks.block_k, blocks.kv_length, blocks.gaps
    )
    parts = blocks.block_k // config.block_k
    if parts > 1:
        indices = (indices[..., None] * parts + np.arange(parts)).reshape(*indices.shape[:-1], -1)
        counts = counts * parts
    pieces = blocks.block_q // config.block_q
    if pieces > 1:
        indices = xp.repeat(indices, pieces, -2)[..., :tiles, :]
        counts = xp.repeat(counts, pieces, -1)[..., :tiles]
    indices, specials = _specials_first(indices, counts, keep.reshape(-1, config.block_k), xp)
    order = np.arange(tiles)
    if blocks.is_static and blocks.is_shared:
        order = np.argsort(-counts, kind="stable")
    return block_list.BlockLists(
        indices=jnp.asarray(indices, jnp.int32).reshape(-1, indices.shape[-1]),
        counts=jnp.asarray(counts, jnp.int32).reshape(-1),
        specials=jnp.asarray(specials, jnp.int32).reshape(-1),
        keep=jnp.asarray(keep, jnp.int32),
        order=jnp.asarray(order, jnp.int32),
    )


def _specials_first(indices, counts, keep: np.ndarray, xp):
    """Lists with the blocks that have hidden rows in front, and how many those are."""
    hidden = ~keep.all(1)
    place = xp.arange(indices.shape[-1])
    special = xp.asarray(hidden)[indices] & (place < counts[..., None])
    if not hidden.any():
        return indices, special.sum(-1)
    order = xp.argsort(xp.where(special, place, place + place.size), -1)
    return xp.take_along_axis(indices, order, -1), special.sum(-1)


def attend_windows(
    call: calls.WindowAttention, config: TileConfig, *, interpret: bool = False
) -> Float[Array, "R2 H T D"]:
    """Rectangles of patches of 8x16 queries."""
    table = tile_keys(call.geometry, call.windows, call.sinks)
    words = None
    if call.exact:
        words = jnp.asarray(_words(call, config.block_k))
    grid = call.geometry.height, call.geometry.width
    out = gather.window_attention(
        call.q, call.k, call.v, grid, jnp.asarray(table.rows),
        jnp.asarray(table.valid.sum(1), jnp.int32), words, config, _softmax(call),
        interpret=interpret,
    )  # fmt: skip
    return _heads_first(out)


def _words(call: calls.WindowAttention, block_k: int) -> Int[np.ndarray, "tiles W 128"]:
    """The token rule with 32 keys in a word, for whole steps of `block_k` keys."""
    mask = tile_mask(call.geometry, call.windows, call.sinks)
    tiles, queries, keys = mask.shape
    padded = np.zeros((tiles, queries, ceil_div(keys, block_k) * block_k), bool)
    padded[..., :keys] = mask
    bits = padded.reshape(tiles, queries, -1, 32).astype(np.uint32)
    words = (bits << np.arange(32, dtype=np.uint32)).sum(-1, dtype=np.uint32)
    return words.swapaxes(1, 2).view(np.int32)


def attend_columns(
    call: calls.ColumnSparseAttention, config: TileConfig, *, interpret: bool = False
) -> Float[Array, "R2 H T D"]:
    """Lists of runs that groups of queries share."""
    out = gather.column_attention(
        call.q, call.k, call.v, call.columns, call.counts, config, _softmax(call),
        kv_length=call.kv_length, group=call.group, granularity=call.granularity, gaps=call.gaps,
        interpret=interpret,
    )  # fmt: skip
    return _heads_first(out)


def column_sums(
    call: calls.AttentionColumnSums, config: TileConfig, *, interpret: bool = False
) -> Float[Array, "R2 H G S2"]:
    """Mass of every key from every group."""
    return sums.column_sums(
        call.q, call.k, call.lse, call.kv_length, call.group, config, gaps=call.gaps,
        scale=call.scale, interpret=interpret,
    )  # fmt: skip


def select_columns(call: calls.SelectColumns, *, interpret: bool = False) -> Array:
    """The heaviest runs, ascending."""

    def find(bits, count):
        return row_thresholds(bits, count, interpret=interpret)

    return select_top(call.sums, call.count, call.granularity, find)
