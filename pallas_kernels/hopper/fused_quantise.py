"""Rows as 8-bit multiples of their largest values on Hopper, in one pass over them.

One warpgroup owns a row at a time and keeps it in registers, as the residual norm does, from which
results of attention do not come.
"""

# Mosaic GPU's references are dynamic: pyright cannot follow their attributes and operators.
# pyright: reportAttributeAccessIssue=false, reportCallIssue=false, reportArgumentType=false

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Shaped

from pallas_kernels.hopper import _mosaic as mosaic
from pallas_kernels.hopper.fused_norm import width_layout
from pallas_kernels.shapes import ceil_div

CTAS = 8
"""CTAs a multiprocessor is given, one warpgroup each: rows are short."""


@functools.partial(jax.jit, static_argnames=("dtype", "multiprocessors"))
def quantise(
    x: Float[Array, "M C"], *, dtype: jnp.dtype, multiprocessors: int
) -> tuple[Shaped[Array, "M C"], Float[Array, "M"]]:
    """Values and the scale of every row; jitted to be lowered once a program."""
    rows, width = x.shape
    chunk = ceil_div(rows, CTAS * multiprocessors)
    layout = width_layout(width)

    def quantise_kernel(x, values, scale):
        first = lax.axis_index("chunk") * chunk

        def step(row, carry):
            y = mosaic.load(x.at[row], layout).astype(jnp.float32)
            y, scale[row] = mosaic.eight_bits(y, dtype)
            values[row] = y.astype(dtype)
            return carry

        lax.fori_loop(first, jnp.minimum(first + chunk, rows), step, None)

    values, scale = plgpu.kernel(
        quantise_kernel,
        out_type=[
            jax.ShapeDtypeStruct(x.shape, dtype),
            jax.ShapeDtypeStruct((rows,), jnp.float32),
        ],
        grid=(ceil_div(rows, chunk),),
        grid_names=("chunk",),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(x)
    return values, scale
