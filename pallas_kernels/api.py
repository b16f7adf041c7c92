"""Public attention operations on one layer's cache, with a choice of implementation.

All take `q: [R', H, T, D]` and padded cache buffers `k, v: [R, H, S, D]` with R' <= R (the first
rows are used), accumulate in float32 and return q's dtype. `implementation`: "mosaic" (Hopper
kernels) or "xla" fail loudly with NotImplementedError when they cannot serve; None takes the best
that can. `implementation_used` tells which one that is.

`logit_bound` promises that absolute scaled logits stay below it, as those of cosine attention do
(100), and that every query sees one key with a logit above `logit_bound - 156`. The kernels then
need no running maximum, which is 10 % faster in bfloat16; other implementations ignore it.

`hidden_finite` promises that rows of v without tokens (in gaps, and from `kv_length` up to the next
multiple of 128) hold finite numbers, as `rotary_to_cache(clear=...)` leaves them. The kernels then
make no copy of the last block of values to keep NaN out.
"""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import support, tuning, xla
from pallas_kernels.selection import select_top
from pallas_kernels.sparsity import (
    BlockTable,
    Gaps,
    Geometry,
    dense_blocks,
    validate_blocks,
    validate_windows,
)

Implementation = Literal["mosaic", "xla"]
OPS = (
    "attention",
    "block_sparse_attention",
    "window_attention",
    "attention_column_sums",
    "column_sparse_attention",
)


def choose(requested: Implementation | None, reason: str) -> Implementation:
    """The implementation to run, given why Mosaic cannot serve ("" when it can)."""
    if requested not in (None, "mosaic", "xla"):
        raise ValueError(f"implementation must be None, 'mosaic' or 'xla'. Got {requested!r}.")
    if requested == "mosaic" and reason:
        raise NotImplementedError(reason)
    if requested is None:
        return "xla" if reason else "mosaic"
    return requested


def _mosaic_ops():
    """The kernel wrappers; imported late, because they need a jax that has Mosaic GPU."""
    from pallas_kernels import mosaic_ops

    return mosaic_ops


def _kernel_reason(op: str, q: Array, k: Array, v: Array) -> str:
    if op not in OPS:
        raise ValueError(f"op must be one of {OPS}. Got {op!r}.")
    return support.device_reason() or support.operand_reason(q, k, v)


def implementation_used(
    op: str,
    q: Array,
    k: Array,
    v: Array,
    *,
    implementation: Implementation | None = None,
    blocks: BlockTable | None = None,
    group: int = 192,
) -> str:
    """Name of what serves `op` on these operands: "mosaic", "cudnn" or "xla".

    cuDNN serves dense calls without gaps and without a log-sum-exp; the others go through XLA.
    `blocks` and `group` are those of the call, where the op has them.
    """
    reason = _kernel_reason(op, q, k, v)
    if op == "block_sparse_attention" and blocks is not None:
        reason = reason or support.block_reason(blocks, q.shape[-1])
    if op == "column_sparse_attention" or op == "attention_column_sums":
        reason = reason or support.group_reason(group)
    chosen = choose(implementation, reason)
    if chosen == "xla" and op == "attention" and implementation is None:
        return "xla" if support.cudnn_reason(q) else "cudnn"
    return chosen


def attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    kv_length: int,
    *,
    implementation: Implementation | None = None,
    return_lse: bool = False,
    gaps: Gaps = (),
    scale: float = 1.0,
    logit_bound: float | None = None,
    hidden_finite: bool = False,
) -> Float[Array, "R2 H T D"] | tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]:
    """Dense attention over the first `kv_length` cache rows; lse is natural and float32.

    Cache rows at and beyond `kv_length` (static) and in `gaps`, static [start, stop) row ranges
    without tokens, may hold anything, NaN included.
    """
    support.validate_operands(q, k, v, kv_length)
    used = implementation_used("attention", q, k, v, implementation=implementation)
    if used == "cudnn" and not return_lse and not gaps:
        return xla.attention_cudnn(q, k, v, kv_length, scale=scale)
    if used == "mosaic":
        config = tuning.block_list_config("dense", q.shape[-1], logit_bound is not None)
        blocks = dense_blocks(
            q.shape[2], kv_length, block_q=config.block_q, block_k=config.block_k, gaps=gaps
        )
        out, lse = _mosaic_ops().attend_blocks(
            q, k, v, blocks, config, scale=scale, logit_bound=logit_bound,
            hidden_finite=hidden_finite,
        )  # fmt: skip
    else:
        out, lse = xla.attention(q, k, v, kv_length, gaps=gaps, scale=scale)
    return (out, lse) if return_lse else out


def block_sparse_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    blocks: BlockTable,
    *,
    implementation: Implementation | None = None,
    return_lse: bool = False,
    scale: float = 1.0,
    logit_bound: float | None = None,
    hidden_finite: bool = False,
) -> Float[Array, "R2 H T D"] | tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H T"]]:
    """Softmax over the keys of the kept blocks; a query block without blocks gives zeros."""
    support.validate_operands(q, k, v, blocks.kv_length)
    validate_blocks(blocks, q.shape[0], q.shape[1], q.shape[2], k.shape[2])
    used = implementation_used(
        "block_sparse_attention", q, k, v, implementation=implementation, blocks=blocks
    )
    if used == "mosaic":
        bounded = logit_bound is not None
        config = tuning.block_list_config("blocks", q.shape[-1], bounded, blocks.block_k)
        out, lse = _mosaic_ops().attend_blocks(
            q, k, v, blocks, config, scale=scale, logit_bound=logit_bound,
            hidden_finite=hidden_finite,
        )  # fmt: skip
    else:
        out, lse = xla.block_sparse_attention(q, k, v, blocks, scale=scale)
    return (out, lse) if return_lse else out


def window_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    geometry: Geometry,
    windows: tuple[int, ...],
    sinks: int,
    *,
    exact: bool = False,
    implementation: Implementation | None = None,
    scale: float = 1.0,
    logit_bound: float | None = None,
) -> Float[Array, "R2 H T D"]:
    """Cross-scale windows: a patch of 8x16 queries reads one rectangle per key grid.

    Queries are in raster order of the `geometry` grid (no padding). `sinks`: number of leading key
    grids that everyone sees. `exact=True` masks to the token rule; `exact=False` lets every query
    of the patch see the patch's rectangles.
    """
    support.validate_operands(q, k, v, geometry.kv_length)
    validate_windows(geometry, windows, sinks)
    if q.shape[2] != geometry.height * geometry.width:
        raise ValueError(
            f"q must hold the {geometry.height}x{geometry.width} query grid. "
            f"Got {q.shape[2]} tokens."
        )
    used = implementation_used("window_attention", q, k, v, implementation=implementation)
    if used == "mosaic":
        config = tuning.gather_config("windows", q.shape[-1], logit_bound is not None)
        return _mosaic_ops().attend_windows(
            q, k, v, geometry, windows, sinks, config, exact=exact, scale=scale,
            logit_bound=logit_bound,
        )  # fmt: skip
    return xla.window_attention(q, k, v, geometry, windows, sinks, exact=exact, scale=scale)


def attention_column_sums(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    kv_length: int,
    group: int = 192,
    *,
    implementation: Implementation | None = None,
    gaps: Gaps = (),
    scale: float = 1.0,
    logit_bound: float | None = None,
    hidden_finite: bool = False,
) -> tuple[Float[Array, "R2 H T D"], Float[Array, "R2 H G S2"]]:
    """Dense output, and the probability mass each key gets from each group of `group` queries.

    The sums are float32 [R', H, ceil(T / group), kv_length]; the last group may be ragged.
    """
    support.validate_operands(q, k, v, kv_length)
    used = implementation_used(
        "attention_column_sums", q, k, v, implementation=implementation, group=group
    )
    out, lse = attention(
        q, k, v, kv_length, implementation=implementation, return_lse=True, gaps=gaps,
        scale=scale, logit_bound=logit_bound, hidden_finite=hidden_finite,
    )  # fmt: skip
    if used == "mosaic":
        return out, _mosaic_ops().column_sums(q, k, lse, kv_length, group, gaps=gaps, scale=scale)
    return out, xla.column_sums(q, k, lse, kv_length, group, gaps=gaps, scale=scale)


def select_columns(
    sums: Float[Array, "R2 H G S2"],
    count: int,
    *,
    granularity: int = 1,
    implementation: Implementation | None = None,
) -> Int[Array, "R2 H G count"]:
    """The `count` heaviest columns (or runs of `granularity` columns), ascending.

    Returns run numbers: run i covers cache rows `i * granularity` on. Ties go to the lower number.
    """
    runs = -(-sums.shape[-1] // granularity)
    if not 0 < count <= runs:
        raise ValueError(f"count must lie in 1..{runs}, the number of runs. Got {count}.")
    used = choose(implementation, support.device_reason())
    find = _mosaic_ops().row_thresholds if used == "mosaic" else None
    return select_top(sums, count, granularity, find)


def column_sparse_attention(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    columns: Int[Array, "R2 H G K"],
    counts: Int[Array, "#R2 #H #G"] | int,
    *,
    kv_length: int,
    group: int = 192,
    granularity: int = 8,
    implementation: Implementation | None = None,
    gaps: Gaps = (),
    scale: float = 1.0,
    logit_bound: float | None = None,
) -> Float[Array, "R2 H T D"]:
    """Each group of `group` queries attends to its own list of keys (or runs of 8 keys).

    columns: traced run numbers, valid up to `counts`; run i covers cache rows `i * granularity` on.
    Lists must not repeat a run: a key listed twice would count twice. Keys at and beyond
    `kv_length` or inside `gaps` are masked.
    """
    support.validate_operands(q, k, v, kv_length)
    groups = -(-q.shape[2] // group)
    if columns.shape[:3] != (*q.shape[:2], groups):
        raise ValueError(
            f"columns must be {(*q.shape[:2], groups, 'K')} for groups of {group} queries. "
            f"Got {columns.shape}."
        )
    if granularity not in (1, 8):
        raise ValueError(f"granularity must be 1 or 8. Got {granularity}.")
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), columns.shape[:3])
    used = implementation_used(
        "column_sparse_attention", q, k, v, implementation=implementation, group=group
    )
    if used == "mosaic":
        config = tuning.gather_config("columns", q.shape[-1], logit_bound is not None, group)
        return _mosaic_ops().attend_columns(
            q, k, v, columns, counts, config, kv_length=kv_length, granularity=granularity,
            gaps=gaps, scale=scale, logit_bound=logit_bound,
        )  # fmt: skip
    return xla.column_sparse_attention(
        q, k, v, columns, counts, kv_length=kv_length, group=group, granularity=granularity,
        gaps=gaps, scale=scale,
    )  # fmt: skip
