"""Products of 16-bit activations with 8-bit weights, for few rows: bound by the weights they read.

A program has some outputs for a tile of rows, and walks the inputs: weights come as 8-bit values,
become 16-bit ones in registers, where every such value is exact, and meet the activations as those
are. Sums are of float32; the scale of an output multiplies its sum once.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels import calls
from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable.tuning import Launch
from pallas_kernels.shapes import ceil_div

_OUTPUTS = 32
"""Of a program: few, so that small matrices have programs for all multiprocessors."""
_BYTES = 1 << 15
"""Of activations in a step: with four steps on the way they and the weights fit shared memory."""


def weight_matmul(call: calls.WeightMatmul) -> Float[Array, "R T O"]:
    """`x @ weight.T`, scaled; rows of all batch entries together."""
    batch, tokens, inputs = call.x.shape
    rows, outputs = batch * tokens, call.weight.shape[0]
    tile = min(128, max(16, 1 << (rows - 1).bit_length()))
    # 256 columns of e4m3 beside more rows than 16 spill registers on Hopper.
    step = max(64, min(256 if tile == 16 else 128, _BYTES // (2 * tile)))

    def weight_matmul_kernel(x_ref, weight_ref, scale_ref, out_ref):
        row = pl.program_id(1) * tile + jnp.arange(tile, dtype=jnp.int32)
        output = pl.program_id(0) * _OUTPUTS + jnp.arange(_OUTPUTS, dtype=jnp.int32)
        wanted, made = row < rows, output < outputs

        def add(number, total):
            column = number * step + jnp.arange(step, dtype=jnp.int32)
            left = column < inputs
            x, weight = (
                pltriton.load(
                    ref.at[at[:, None], column[None, :]],
                    mask=tri.spread(there, step) & left[None, :],
                    other=0.0,
                )
                for ref, at, there in ((x_ref, row, wanted), (weight_ref, output, made))
            )
            return total + tri.product(x, weight.astype(x.dtype), 1)

        total = jnp.zeros((tile, _OUTPUTS), jnp.float32)
        steps = jnp.int32(ceil_div(inputs, step))
        total = lax.fori_loop(jnp.int32(0), steps, add, total)
        scale = pltriton.load(scale_ref.at[output], mask=made, other=0.0)
        y = (total * scale[None, :]).astype(out_ref.dtype)
        at = out_ref.at[row[:, None], output[None, :]]
        pltriton.store(at, y, mask=tri.spread(wanted, _OUTPUTS) & made[None, :])

    grid = (ceil_div(outputs, _OUTPUTS), ceil_div(rows, tile))
    out = tri.call(
        weight_matmul_kernel, jax.ShapeDtypeStruct((rows, outputs), call.dtype), grid,
        Launch(warps=4, stages=4), call.x.reshape(rows, inputs), call.weight, call.weight_scale,
    )  # fmt: skip
    return out.reshape(batch, tokens, outputs)
