"""Wrapper of the column-sum kernel: pads the log-sum-exp to whole groups and hides rows."""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.hopper._mosaic import LOG2E, pad_rows
from pallas_kernels.hopper.column_sums import column_sums_kernel
from pallas_kernels.hopper.tuning import ColumnSumsConfig, column_sums_config
from pallas_kernels.shapes import ceil_div
from pallas_kernels.sparsity import Gaps, visible_rows
from pallas_kernels.support import MULTIPROCESSORS


def column_sums(
    q: Float[Array, "R2 H T D"],
    k: Float[Array, "R H S D"],
    lse: Float[Array, "R2 H T"],
    kv_length: int,
    group: int,
    *,
    config: ColumnSumsConfig | None = None,
    gaps: Gaps = (),
    scale: float = 1.0,
    ctas: int = MULTIPROCESSORS,
) -> Float[Array, "R2 H G S2"]:
    """Attention mass every key receives from each group of `group` queries, from a known lse."""
    rows, heads, queries, head_dim = q.shape
    config = config or column_sums_config(head_dim)
    n, groups = rows * heads, ceil_div(queries, group)
    padded = jnp.pad(
        lse.reshape(n, queries) * LOG2E, ((0, 0), (0, groups * group - queries)),
        constant_values=jnp.inf,
    )  # fmt: skip
    sums = column_sums_kernel(
        pad_rows(q.reshape(n, queries, head_dim)), k.reshape(-1, *k.shape[2:]),
        padded.reshape(n, groups, group), ceil_div(kv_length, config.block_k), config,
        scale=scale, ctas=ctas,
    )  # fmt: skip
    sums = sums[..., :kv_length]
    if gaps:
        sums = jnp.where(visible_rows(kv_length, kv_length, gaps), sums, 0.0)
    return sums.reshape(rows, heads, groups, kv_length)
