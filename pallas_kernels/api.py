"""Public attention operations on one layer's cache, with a choice of implementation.

All take `q: [R', H, T, D]` and padded cache buffers `k, v: [R, H, S, D]` with R' <= R (the first
rows are used), accumulate in float32 and return q's dtype. `implementation` names a backend:
"hopper" (our kernels for that GPU), "portable" (for GPUs since Ampere), "cudnn" (attention, sparse
patterns as copies of their keys), "xla", or one that was added with `backends.register`. It fails
loudly with NotImplementedError when it cannot serve the call, and with ValueError when nobody has
heard of it; None takes the best backend that can serve, on the path that `backends.use` or
SPARVAR_KERNELS has chosen. `implementation_used` tells which one that is. What the choice depends
on is the call and the device that it will run on (`support.device_of`).

`logit_bound` promises that absolute scaled logits stay below it, as those of cosine attention do
(100), and that every query sees one key with a logit above `logit_bound - 156`. The kernels then
need no running maximum, which is 10 % faster in bfloat16; other backends ignore it.

`hidden_finite` promises that rows of v without tokens (in gaps, and from `kv_length` up to the next
multiple of 128) hold finite numbers, as `rotary_to_cache(clear=...)` leaves them. The kernels then
make no copy of the last block of values to keep NaN out.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels import backends, calls, support
from pallas_kernels.backends import Implementation
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import (
    BlockTable,
    Gaps,
    Geometry,
    dense_blocks,
    validate_blocks,
    validate_windows,
)

Operand = Array | jax.ShapeDtypeStruct


def implementation_used(
    op: str,
    q: Float[Operand, "R2 H T D"],
    k: Float[Operand, "R H S D"],
    v: Float[Operand, "R H S D"],
    *,
    implementation: Implementation | None = None,
    blocks: BlockTable | None = None,
    group: int = 192,
    gaps: Gaps = (),
    return_lse: bool = False,
    geometry: Geometry | None = None,
) -> str:
    """Name of the backend that serves attention `op` on these operands: one to ask for by name.

    Operands may be arrays or shapes. The other arguments are those of the call, where the op has
    them and where it is not a plain one. Raises ValueError for an unknown op or implementation,
    NotImplementedError where the implementation asked for cannot serve.
    """
    chosen: list[str] = []
    device = support.device_of(q, k, v)

    def choose(q: Array, k: Array, v: Array) -> None:
        call = _example(
            op, device, q, k, v, blocks=blocks, group=group, gaps=gaps, return_lse=return_lse,
            geometry=geometry,
        )  # fmt: skip
        chosen.append(backends.select(call, implementation).name)

    jax.eval_shape(choose, q, k, v)
    return chosen[0]


def _example(
    op: str,
    device: support.Device,
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    v: Float[Array, "R H S D"],
    *,
    blocks: BlockTable | None,
    group: int,
    gaps: Gaps,
    return_lse: bool,
    geometry: Geometry | None,
) -> calls.Call:
    """A call of `op` on these operands; what is not given is plain: all keys, one grid."""
    rows, heads, queries, _ = q.shape
    lists, cached = (rows, heads, ceil_div(queries, group)), k.shape[2]
    given: dict[str, Any] = dict(device=device, q=q, k=k, v=v)
    if op == "attention":
        return calls.Attention(**given, kv_length=cached, gaps=gaps, return_lse=return_lse)
    if op == "block_sparse_attention":
        blocks = dense_blocks(queries, cached) if blocks is None else blocks
        return calls.BlockSparseAttention(**given, blocks=blocks, return_lse=return_lse)
    if op == "window_attention":
        geometry = geometry or Geometry.packed(((1, queries),))
        windows = (-1,) * len(geometry.keys)
        return calls.WindowAttention(**given, geometry=geometry, windows=windows, sinks=0)
    if op == "attention_column_sums":
        lse = jnp.zeros(q.shape[:3])
        return calls.AttentionColumnSums(**given, lse=lse, kv_length=cached, group=group, gaps=gaps)
    if op == "column_sparse_attention":
        columns, counts = jnp.zeros((*lists, 1), jnp.int32), jnp.zeros(lists, jnp.int32)
        return calls.ColumnSparseAttention(
            **given, columns=columns, counts=counts, kv_length=cached, group=group, granularity=8,
            gaps=gaps,
        )  # fmt: skip
    raise ValueError(f"op must be the name of an attention operation. Got {op!r}.")


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
    support.validate_operands(q, k, v, kv_length, gaps)
    call = calls.Attention(
        device=support.device_of(q, k, v), q=q, k=k, v=v, kv_length=kv_length,
        return_lse=return_lse, gaps=gaps, scale=scale, logit_bound=logit_bound,
        hidden_finite=hidden_finite,
    )  # fmt: skip
    return backends.serve(call, implementation)


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
    call = calls.BlockSparseAttention(
        device=support.device_of(q, k, v, blocks), q=q, k=k, v=v, blocks=blocks,
        return_lse=return_lse, scale=scale, logit_bound=logit_bound, hidden_finite=hidden_finite,
    )  # fmt: skip
    return backends.serve(call, implementation)


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
    call = calls.WindowAttention(
        device=support.device_of(q, k, v), q=q, k=k, v=v, geometry=geometry, windows=windows,
        sinks=sinks, exact=exact, scale=scale, logit_bound=logit_bound,
    )  # fmt: skip
    return backends.serve(call, implementation)


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
    support.validate_operands(q, k, v, kv_length, gaps)
    out, lse = attention(
        q, k, v, kv_length, implementation=implementation, return_lse=True, gaps=gaps,
        scale=scale, logit_bound=logit_bound, hidden_finite=hidden_finite,
    )  # fmt: skip
    call = calls.AttentionColumnSums(
        device=support.device_of(q, k, v), q=q, k=k, v=v, lse=lse, kv_length=kv_length,
        group=group, gaps=gaps, scale=scale,
    )  # fmt: skip
    return out, backends.serve(call, implementation)


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
    call = calls.SelectColumns(
        device=support.device_of(sums), sums=sums, count=count, granularity=granularity
    )
    return backends.serve(call, implementation)


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
    support.validate_operands(q, k, v, kv_length, gaps)
    groups = ceil_div(q.shape[2], group)
    if columns.shape[:3] != (*q.shape[:2], groups):
        raise ValueError(
            f"columns must be {(*q.shape[:2], groups, 'K')} for groups of {group} queries. "
            f"Got {columns.shape}."
        )
    if granularity not in (1, 8):
        raise ValueError(f"granularity must be 1 or 8. Got {granularity}.")
    counts = jnp.broadcast_to(jnp.asarray(counts, jnp.int32), columns.shape[:3])
    call = calls.ColumnSparseAttention(
        device=support.device_of(q, k, v, columns), q=q, k=k, v=v, columns=columns, counts=counts,
        kv_length=kv_length, group=group, granularity=granularity, gaps=gaps, scale=scale,
        logit_bound=logit_bound,
    )  # fmt: skip
    return backends.serve(call, implementation)
