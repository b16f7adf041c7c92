"""Threshold search on the GPU: the K-th largest value of every row, by bisection on float bits.

One warpgroup holds a row in registers and counts 31 times. That is cheaper than any sort: a row of
4121 sums takes a few microseconds, and every multiprocessor works on several rows at once.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false
# pyright: reportOptionalMemberAccess=false, reportIndexIssue=false, reportGeneralTypeIssues=false
# pyright: reportPrivateImportUsage=false, reportReturnType=false, reportOperatorIssue=false

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int


def row_thresholds(bits: Int[Array, "n X"], count: int) -> Int[Array, " n"]:
    """Largest int32 that at least `count` entries of the row reach; X is a multiple of 128.

    Entries that must not be chosen are negative.
    """

    def row_thresholds_kernel(bits_gmem, out_gmem):
        row = lax.axis_index("row")
        values = bits_gmem[row]

        def narrow(step, low):
            trial = low | lax.shift_left(jnp.int32(1), 30 - step)
            reached = jnp.sum((values >= trial).astype(jnp.int32))
            return jnp.where(reached >= count, trial, low)

        out_gmem[row] = lax.fori_loop(0, 31, narrow, jnp.int32(0))

    return plgpu.kernel(
        row_thresholds_kernel,
        out_type=jax.ShapeDtypeStruct(bits.shape[:1], jnp.int32),
        grid=(bits.shape[0],),
        grid_names=("row",),
    )(bits)
