"""The probability mass that every key gets from every group of queries, given the log-sum-exp.

A program has `block_k` keys and walks all queries in steps that never straddle two groups.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable.tuning import TileConfig
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import Gaps


def column_sums(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    lse: Float[Array, "R2 H T"],
    kv_length: int,
    group: int,
    config: TileConfig,
    *,
    gaps: Gaps = (),
    scale: float = 1.0,
    interpret: bool = False,
) -> Float[Array, "R2 H G S2"]:
    """Sums over the queries of a group; float32, zero for rows without a key."""
    rows, heads, queries, _ = q.shape
    groups, step_q = ceil_div(queries, group), config.block_q
    if group % step_q:
        raise ValueError(f"steps of {step_q} queries must divide groups of {group}.")
    steps = group // step_q

    def kernel(q_ref, k_ref, lse_ref, out_ref):
        item = pl.program_id(1)
        lead = lax.div(item, heads), lax.rem(item, heads)
        row = pl.program_id(0) * config.block_k + jnp.arange(config.block_k, dtype=jnp.int32)
        inside = row < kv_length
        seen = inside
        for start, stop in gaps:
            seen &= (row < start) | (row >= stop)
        keys = tri.load_rows(k_ref, lead, row, seen)

        def fold(number, mass):
            token = number * step_q + jnp.arange(step_q, dtype=jnp.int32)
            there = token < queries
            scores = tri.product(keys, tri.load_rows(q_ref, lead, token, there), 1)
            at = lse_ref.at[(*lead, jnp.minimum(token, queries - 1))]
            top = pltriton.load(at, mask=there, other=jnp.inf) * tri.LOG2E
            weights = jnp.exp2(scores * (scale * tri.LOG2E) - top[None, :]).sum(1)
            within = lax.rem(number, steps)
            mass = jnp.where(within == 0, weights, mass + weights)
            ends = jnp.broadcast_to(within == steps - 1, row.shape)
            into = out_ref.at[(*lead, lax.div(number, steps), row)]
            pltriton.store(into, jnp.where(seen, mass, 0.0), mask=inside & ends)
            return mass

        zero = jnp.zeros((config.block_k,), jnp.float32)
        lax.fori_loop(jnp.int32(0), jnp.int32(groups * steps), fold, zero)

    out = jax.ShapeDtypeStruct((rows, heads, groups, kv_length), jnp.float32)
    grid = (ceil_div(kv_length, config.block_k), rows * heads)
    return tri.call(kernel, out, grid, config, q, k, lse, interpret=interpret)
