"""The backend "cudnn": dense attention as it is, sparse attention as many short problems.

It needs no kernel of ours, and serves wherever jax can call cuDNN's flash attention.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels import backends, calls
from pallas_kernels.backends import Backend
from pallas_kernels.boxes_table import tile_keys, tile_queries
from pallas_kernels.cudnn import problems
from pallas_kernels.operands import HALVES
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import visible_rows
from pallas_kernels.xla import attention as xla

NAME = "cudnn"


def cache_reason(call: calls.CacheCall) -> str:
    """Why cuDNN cannot serve: device, dtypes, or head dim."""
    head_dim = call.q.shape[-1]
    if not call.device.is_cuda:
        return f"cuDNN needs a CUDA device; the call's device is {call.device.platform}"
    if (call.device.capability or (0, 0)) < (8, 0):
        return "cuDNN attention needs compute capability 8.0 or newer"
    if call.q.dtype not in HALVES or not call.q.dtype == call.k.dtype == call.v.dtype:
        return f"cuDNN attention takes one dtype of 16-bit floats; got {call.q.dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"cuDNN attention takes head dims up to 128 in steps of 8; got {head_dim}"
    return ""


def attention_unasked(call: calls.Attention) -> str:
    """What kernels do better where there are some: unless this path was chosen, they may."""
    if backends.path() == NAME:
        return ""
    if call.return_lse:
        return "cuDNN gives no float32 log-sum-exp; XLA would compute it beside"
    if call.gaps:
        return "cuDNN reads all keys it is given: rows around gaps are copied"
    return ""


def blocks_reason(call: calls.BlockSparseAttention) -> str:
    """As `cache_reason`; a log-sum-exp is left to XLA."""
    if (reason := cache_reason(call)) or not call.return_lse:
        return reason
    return "cuDNN attention gives no float32 log-sum-exp"


def windows_reason(call: calls.WindowAttention) -> str:
    """As `cache_reason`, for whole rectangles."""
    if (reason := cache_reason(call)) or not call.exact:
        return reason
    return "cuDNN attention shows all listed keys to all queries of a patch; got exact windows"


def sums_reason(call: calls.AttentionColumnSums) -> str:
    """As `cache_reason`, and groups that fit the channels of a value."""
    groups, head_dim = ceil_div(call.q.shape[2], call.group), call.q.shape[3]
    if (reason := cache_reason(call)) or groups <= head_dim:
        return reason
    return f"column sums through cuDNN take as many groups as channels; got {groups} > {head_dim}"


def attention(call: calls.Attention) -> Any:
    """Dense attention over the rows that hold keys; a log-sum-exp comes from XLA.

    jax rounds cuDNN's own to 16 bits. Where nobody reads it (column sums need none here), the
    compiler drops what computes it.
    """
    k, v = (_tokens(x, call) for x in (call.k, call.v))
    out = problems.attend(call.q.swapaxes(1, 2), k, v, call.scale).swapaxes(1, 2)
    if not call.return_lse:
        return out
    _, lse = xla.attention(call.q, call.k, call.v, call.kv_length, gaps=call.gaps, scale=call.scale)
    return out, lse


def _tokens(
    x: Float[Array, "R H S D"], call: calls.Attention | calls.AttentionColumnSums
) -> Float[Array, "R2 S2 H D"]:
    """Token-major rows that hold a key."""
    x = x[: call.q.shape[0], :, : call.kv_length]
    if call.gaps:
        x = jnp.take(x, _rows(call), axis=2, mode="clip")
    return x.swapaxes(1, 2)


def _rows(call: calls.Attention | calls.AttentionColumnSums) -> np.ndarray:
    seen = visible_rows(call.kv_length, call.kv_length, call.gaps)
    return np.flatnonzero(seen).astype(np.int32)


def block_sparse_attention(call: calls.BlockSparseAttention) -> Float[Array, "R2 H T D"]:
    """The kept blocks of a query block are its list."""
    blocks, queries = call.blocks, call.q.shape[2]
    width = ceil_div(blocks.kv_length, blocks.block_k) * blocks.block_k
    seen = visible_rows(width, blocks.kv_length, blocks.gaps)
    within = np.arange(blocks.block_k, dtype=np.int32)
    if blocks.is_static and blocks.is_shared:
        lists = []
        for row, count in zip(blocks.indices, blocks.counts, strict=True):
            listed = (row[:count, None] * blocks.block_k + within).reshape(-1)
            lists.append(listed[seen[listed]].astype(np.int32))
        index = np.arange(len(lists) * blocks.block_q).reshape(len(lists), -1)
        return problems.attend_static(
            call.q, call.k, call.v, np.minimum(index, queries), tuple(lists), call.scale
        )
    lead = call.q.shape[:2]
    indices, counts = jnp.asarray(blocks.indices), jnp.asarray(blocks.counts)
    indices = jnp.broadcast_to(indices, (*lead, *indices.shape[-2:]))
    counts = jnp.broadcast_to(counts, (*lead, *counts.shape[-1:]))
    listed = indices[..., None] * blocks.block_k + within
    kept = (jnp.arange(indices.shape[-1]) < counts[..., None])[..., None]
    shape = (*indices.shape[:-1], -1)
    keep = (kept & jnp.asarray(seen)[listed]).reshape(shape)
    return problems.attend_traced(
        call.q, call.k, call.v, blocks.block_q, listed.reshape(shape), keep, call.scale
    )


def window_attention(call: calls.WindowAttention) -> Float[Array, "R2 H T D"]:
    """The rectangles of a patch are its list."""
    table = tile_keys(call.geometry, call.windows, call.sinks)
    index = tile_queries(call.geometry, table.tile_height, table.tile_width)
    lists = tuple(rows[valid] for rows, valid in zip(table.rows, table.valid, strict=True))
    return problems.attend_static(call.q, call.k, call.v, index, lists, call.scale)


def column_sparse_attention(call: calls.ColumnSparseAttention) -> Float[Array, "R2 H T D"]:
    """The columns of a group are its list."""
    within = jnp.arange(call.granularity, dtype=jnp.int32)
    listed = call.columns[..., None] * call.granularity + within
    kept = (jnp.arange(call.columns.shape[-1]) < call.counts[..., None])[..., None]
    cached = call.k.shape[2]
    seen = jnp.asarray(visible_rows(cached, call.kv_length, call.gaps))
    keep = kept & (listed < cached) & jnp.take(seen, listed, mode="clip")
    shape = (*call.columns.shape[:-1], -1)
    return problems.attend_traced(
        call.q, call.k, call.v, call.group, listed.reshape(shape), keep.reshape(shape), call.scale
    )


def attention_column_sums(call: calls.AttentionColumnSums) -> Float[Array, "R2 H G S2"]:
    """The gradient of the values, where every group of queries asks for a channel of its own.

    Values get `weights^T g` from a gradient g of the output. With a one in channel i for the
    queries of group i that is the mass every key gets from the group. So cuDNN's backward pass
    computes it without the log-sum-exp of the call. Rounded to q's dtype, from float32 sums.
    """
    queries, head_dim = call.q.shape[2:]
    groups = ceil_div(queries, call.group)
    q, keys = _even(call.q.swapaxes(1, 2)), _tokens(call.k, call)
    tokens = keys.shape[1]
    keys = _even(keys)
    lengths = None
    if keys.shape[1] != tokens:
        lengths = jnp.full(len(q), tokens, jnp.int32)
    _, gradient = jax.vjp(lambda v: problems.attend(q, keys, v, call.scale, lengths), keys)
    # Queries that only fill up ask for nothing.
    group = np.where(np.arange(q.shape[1]) < queries, np.arange(q.shape[1]) // call.group, head_dim)
    asked = jnp.asarray(group[:, None] == np.arange(head_dim), q.dtype)[None, :, None]
    (mass,) = gradient(jnp.broadcast_to(asked, q.shape))
    sums = mass[:, :tokens, :, :groups].transpose(0, 2, 3, 1).astype(jnp.float32)
    if not call.gaps:
        return sums
    whole = jnp.zeros((*sums.shape[:3], call.kv_length), jnp.float32)
    return whole.at[..., _rows(call)].set(sums)


def _even(x: Float[Array, "R T H D"]) -> Float[Array, "R T2 H D"]:
    """The backward pass takes even lengths: one more token of zeros for odd ones."""
    return jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))


SERVED = {
    "attention": Backend(NAME, cache_reason, attention, attention_unasked),
    "block_sparse_attention": Backend(NAME, blocks_reason, block_sparse_attention),
    "window_attention": Backend(NAME, windows_reason, window_attention),
    "attention_column_sums": Backend(NAME, sums_reason, attention_column_sums),
    "column_sparse_attention": Backend(NAME, cache_reason, column_sparse_attention),
}
"""The backend of every operation that it has."""
