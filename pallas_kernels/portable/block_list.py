"""Dense and block-sparse attention: a program walks the list of key blocks of one query block.

Blocks with hidden rows come first in a list; their rows are masked and loaded as zeros, so nothing
hidden is ever multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float, Int

from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable.tuning import TileConfig
from pallas_kernels.shapes import ceil_div


@dataclass(frozen=True)
class BlockLists:
    """Lists of key blocks of `config.block_k` keys, one a query block.

    indices [tables, cap]: blocks of every list, those with hidden rows first; counts, specials
    [tables]: how many there are, and how many have hidden rows. One table a query block (shared),
    or one a (row, head, query block). keep [blocks * block_k]: whether a row holds a key.
    order [query blocks]: the longest lists first.
    """

    indices: Int[Array, "tables cap"]
    counts: Int[Array, " tables"]
    specials: Int[Array, " tables"]
    keep: Int[Array, " X"]
    order: Int[Array, " tiles"]


def dense_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    kv_length: int,
    config: TileConfig,
    softmax: tri.Softmax,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R2 T H D"], Float[Array, "R2 H T"]]:
    """Token-major output over the first `kv_length` keys, and natural log-sum-exp."""
    whole = kv_length // config.block_k

    def kernel(q_ref, k_ref, v_ref, out_ref, lse_ref):
        place = _Place(q_ref, config.block_q, pl.program_id(0))
        running = softmax.start(config.block_q, q.shape[-1])
        queries = place.queries()

        def full(step):
            start = step * config.block_k
            keys, values = (
                tri.load_block(x, place.lead, start, config.block_k) for x in (k_ref, v_ref)
            )
            return keys, values, None

        running = tri.walk(softmax, queries, running, (0, whole), full)
        if kv_length % config.block_k:
            rows = whole * config.block_k + jnp.arange(config.block_k, dtype=jnp.int32)
            seen = rows < kv_length
            keys, values = (tri.load_rows(x, place.lead, rows, seen) for x in (k_ref, v_ref))
            running = softmax.fold(running, queries, keys, values, seen[None])
        place.write(softmax.finish(running), out_ref, lse_ref)

    return _run(kernel, config, (q, k, v), interpret=interpret)


def block_list_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    lists: BlockLists,
    config: TileConfig,
    softmax: tri.Softmax,
    *,
    interpret: bool = False,
) -> tuple[Float[Array, "R2 T H D"], Float[Array, "R2 H T"]]:
    """Token-major output over the listed blocks, and natural log-sum-exp."""
    tiles, block_k = lists.order.shape[0], config.block_k
    shared = lists.counts.shape[0] == tiles

    def kernel(q_ref, k_ref, v_ref, indices, counts, specials, keep, order, out_ref, lse_ref):
        place = _Place(q_ref, config.block_q, order[pl.program_id(0)])
        table = place.tile if shared else place.item * tiles + place.tile
        special, count = specials[table], counts[table]
        running = softmax.start(config.block_q, q.shape[-1])
        queries = place.queries()

        def masked(step):
            rows = indices[table, step] * block_k + jnp.arange(block_k, dtype=jnp.int32)
            seen = pltriton.load(keep.at[rows]) > 0
            keys, values = (tri.load_rows(x, place.lead, rows, seen) for x in (k_ref, v_ref))
            return keys, values, seen[None]

        running = tri.walk(softmax, queries, running, (0, special), masked)

        # The number of the next block is read a step ahead of its keys.
        def whole(step, carried):
            running, block = carried
            following = indices[table, jnp.minimum(step + 1, indices.shape[1] - 1)]
            keys, values = (
                tri.load_block(x, place.lead, block * block_k, block_k) for x in (k_ref, v_ref)
            )
            return softmax.fold(running, queries, keys, values, None), following

        first = indices[table, jnp.minimum(special, indices.shape[1] - 1)]
        running, _ = lax.fori_loop(special, count, whole, (running, first))
        place.write(softmax.finish(running), out_ref, lse_ref)

    operands = (lists.indices, lists.counts, lists.specials, lists.keep, lists.order)
    return _run(kernel, config, (q, k, v), *operands, interpret=interpret)


class _Place:
    """The queries of a program: block `tile` of one (row, head)."""

    def __init__(self, q_ref: Any, block_q: int, tile: Any):
        self.q_ref, self.block_q, self.tile = q_ref, block_q, tile
        self.item, heads = pl.program_id(1), q_ref.shape[1]
        self.lead = lax.div(self.item, heads), lax.rem(self.item, heads)

    def rows(self) -> Int[Array, " M"]:
        return self.tile * self.block_q + jnp.arange(self.block_q, dtype=jnp.int32)

    def queries(self) -> Float[Array, "M D"]:
        rows = self.rows()
        return tri.load_rows(self.q_ref, self.lead, rows, rows < self.q_ref.shape[2])

    def write(self, finished, out_ref, lse_ref) -> None:
        out, lse = finished
        rows = self.rows()
        there = rows < self.q_ref.shape[2]
        row, head = self.lead
        tri.store_rows(out_ref, (row,), rows, (head,), there, out)
        pltriton.store(lse_ref.at[row, head, rows], lse, mask=there)


def _run(kernel, config: TileConfig, qkv, *operands, interpret: bool):
    q = qkv[0]
    rows, heads, queries, head_dim = q.shape
    out = (
        jax.ShapeDtypeStruct((rows, queries, heads, head_dim), q.dtype),
        jax.ShapeDtypeStruct((rows, heads, queries), jnp.float32),
    )
    grid = (ceil_div(queries, config.block_q), rows * heads)
    return tri.call(kernel, out, grid, config, *qkv, *operands, interpret=interpret)
