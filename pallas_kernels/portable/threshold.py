"""The exact value of the last kept column of every row, in one program a row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Int

from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable.tuning import Launch


def row_thresholds(
    bits: Int[Array, "m X"], count: int, *, interpret: bool = False
) -> Int[Array, " m"]:
    """Largest int32 that at least `count` entries of the row reach (0 at least)."""
    rows, width = bits.shape
    padded = 1 << (width - 1).bit_length()

    def kernel(bits_ref, out_ref):
        row = pl.program_id(0)
        place = jnp.arange(padded, dtype=jnp.int32)
        at = bits_ref.at[row, jnp.minimum(place, width - 1)]
        values = pltriton.load(at, mask=place < width, other=-1)

        def narrow(step, low):
            trial = low | (jnp.int32(1) << (30 - step))
            enough = (values >= trial).astype(jnp.int32).sum() >= count
            return jnp.where(enough, trial, low)

        out_ref[row] = lax.fori_loop(jnp.int32(0), jnp.int32(31), narrow, jnp.int32(0))

    launch = Launch(warps=8 if padded > 2048 else 4, stages=1)
    out = jax.ShapeDtypeStruct((rows,), jnp.int32)
    return tri.call(kernel, out, (rows,), launch, bits, interpret=interpret)
