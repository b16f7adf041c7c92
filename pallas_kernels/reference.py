"""Float32 references with the names of the public ops: plain, dense and obviously right.

They build whole masks and whole score matrices, so they are for tests and for reading. `xla.py` has
the formulations whose work and memory shrink with density.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import BlockTable, Gaps, Geometry, token_rule, visible_rows


def masked_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    mask: Bool[Array, "#R2 #H #T S"],
    scale: float = 1.0,
) -> tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]:
    """Softmax attention under a mask and its natural log-sum-exp, in float32.

    Rows whose mask is empty give zeros and a log-sum-exp of -inf. Masked keys may hold NaN.
    """
    rows = q.shape[0]
    seen = mask.any((0, 1, 2))[:, None]
    k32 = jnp.where(seen, k[:rows].astype(jnp.float32), 0.0)
    v32 = jnp.where(seen, v[:rows].astype(jnp.float32), 0.0)
    with jax.default_matmul_precision("highest"):
        scores = jnp.einsum("rhtd,rhsd->rhts", q.astype(jnp.float32), k32) * scale
        scores = jnp.where(mask, scores, -jnp.inf)
        top = scores.max(-1, keepdims=True)
        weights = jnp.exp(scores - jnp.where(top == -jnp.inf, 0.0, top))
        total = weights.sum(-1, keepdims=True)
        out = jnp.einsum("rhts,rhsd->rhtd", weights / jnp.maximum(total, 1e-37), v32)
    return out, (jnp.log(total) + top)[..., 0]


def attention(
    q, k, v, kv_length: int, *, gaps: Gaps = (), return_lse: bool = False, scale: float = 1.0
):
    """Reference of `api.attention`."""
    mask = jnp.asarray(visible_rows(k.shape[2], kv_length, gaps))[None, None, None]
    out, lse = masked_attention(q, k, v, mask, scale)
    return (out, lse) if return_lse else out


def block_mask(blocks: BlockTable, queries: int, keys: int) -> Bool[Array, "*rh T S"]:
    """Token mask of a block table."""
    nk = ceil_div(keys, blocks.block_k)
    slot = jnp.arange(blocks.indices.shape[-1])
    kept = slot < jnp.asarray(blocks.counts)[..., None]
    hits = jnp.asarray(blocks.indices)[..., None] == jnp.arange(nk)
    table = (hits & kept[..., None]).any(-2)
    mask = jnp.repeat(jnp.repeat(table, blocks.block_q, -2), blocks.block_k, -1)
    return mask[..., :queries, :keys] & visible_rows(keys, blocks.kv_length, blocks.gaps)


def block_sparse_attention(
    q, k, v, blocks: BlockTable, *, return_lse: bool = False, scale: float = 1.0
):
    """Reference of `api.block_sparse_attention`."""
    mask = block_mask(blocks, q.shape[2], k.shape[2])
    out, lse = masked_attention(q, k, v, mask[None, None] if mask.ndim == 2 else mask, scale)
    return (out, lse) if return_lse else out


def window_attention(
    q, k, v, geometry: Geometry, windows: tuple[int, ...], sinks: int, *, scale: float = 1.0
):
    """Reference of `api.window_attention` with `exact=True` (the token rule)."""
    mask = np.zeros((geometry.height * geometry.width, k.shape[2]), bool)
    mask[:, : geometry.kv_length] = token_rule(geometry, windows, sinks)
    return masked_attention(q, k, v, jnp.asarray(mask)[None, None], scale)[0]


def attention_column_sums(
    q, k, v, kv_length: int, group: int, *, gaps: Gaps = (), scale: float = 1.0
) -> tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H G S2"]]:
    """Reference of `api.attention_column_sums`."""
    out, lse = attention(q, k, v, kv_length, gaps=gaps, return_lse=True, scale=scale)
    with jax.default_matmul_precision("highest"):
        keys = k[: q.shape[0], :, :kv_length].astype(jnp.float32)
        scores = jnp.einsum("rhtd,rhsd->rhts", q.astype(jnp.float32), keys) * scale
    seen = visible_rows(kv_length, kv_length, gaps)
    weights = jnp.where(seen, jnp.exp(scores - lse[..., None]), 0.0)
    groups = ceil_div(q.shape[2], group)
    pad = groups * group - q.shape[2]
    weights = jnp.pad(weights, ((0, 0), (0, 0), (0, pad), (0, 0)))
    return out, weights.reshape(*q.shape[:2], groups, group, kv_length).sum(3)


def column_mask(
    columns: Int[Array, "R H G K"], counts: Int[Array, "R H G"], granularity: int, keys: int
) -> Bool[Array, "R H G S"]:
    """Key mask per query group of lists of runs."""
    kept = jnp.arange(columns.shape[-1]) < counts[..., None]
    units = jnp.zeros((*columns.shape[:-1], ceil_div(keys, granularity) + 1), bool)
    where = jnp.where(kept, columns, units.shape[-1] - 1)
    flat = jax.vmap(lambda row, at: row.at[at].set(True))(
        units.reshape(-1, units.shape[-1]), where.reshape(-1, columns.shape[-1])
    )
    units = flat.reshape(units.shape)[..., :-1]
    return jnp.repeat(units, granularity, -1)[..., :keys]


def column_sparse_attention(
    q,
    k,
    v,
    columns,
    counts,
    *,
    kv_length: int,
    group: int = 192,
    granularity: int = 8,
    gaps: Gaps = (),
    scale: float = 1.0,
):
    """Reference of `api.column_sparse_attention`. Columns must not repeat."""
    counts = jnp.broadcast_to(jnp.asarray(counts), columns.shape[:-1])
    mask = column_mask(columns, counts, granularity, k.shape[2])
    seen = visible_rows(k.shape[2], kv_length, gaps)
    mask = jnp.repeat(mask, group, 2)[:, :, : q.shape[2]] & seen
    return masked_attention(q, k, v, mask, scale)[0]
