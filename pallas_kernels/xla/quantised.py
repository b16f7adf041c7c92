"""Products of 8-bit operands with the compiler's own products: the reference of the kernels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Shaped

BLOCK = 256
LARGEST = {jnp.dtype(jnp.int8): 127.0, jnp.dtype(jnp.float8_e4m3fn): 448.0}
_SMALLEST = 1e-30  # of a row's largest value, so that rows of zeros have a scale


def quantise(
    x: Float[Array, "R T C"], dtype: jnp.dtype, block: int
) -> tuple[Shaped[Array, "R T C"], Float[Array, "blocks R T"]]:
    """Blocks of columns as 8-bit multiples of their largest value, and their scales."""
    wide = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, block)
    top = jnp.maximum(jnp.abs(wide).max(axis=-1), _SMALLEST)
    values = wide * (LARGEST[dtype] / top)[..., None]
    if dtype == jnp.int8:
        values = jnp.round(values)
    scale = jnp.moveaxis(top * (1.0 / LARGEST[dtype]), -1, 0)
    return values.astype(dtype).reshape(x.shape), scale


def quantised_matmul(
    values: Shaped[Array, "R T C"],
    scale: Float[Array, "blocks R T"],
    weight: Shaped[Array, "O C"],
    weight_scale: Float[Array, "O"],
    bias: Float[Array, "O"] | None,
    *,
    gelu: bool,
    dtype: jnp.dtype,
) -> Array | tuple[Array, Array]:
    """Sums of int8 are exact; those of e4m3 are of float32 products of its values, as they are."""
    exact = values.dtype == jnp.int8
    kind = jnp.int32 if exact else jnp.float32
    if not exact:  # or XLA may take the rounding to e4m3 before and the way back for nothing
        values = lax.optimization_barrier(values)

    def product(x: Array, w: Array) -> Array:
        if not exact:
            x, w = x.astype(jnp.float32), w.astype(jnp.float32)
        contract = (((2,), (1,)), ((), ()))
        sums = lax.dot_general(
            x, w, contract, precision=lax.Precision.HIGHEST, preferred_element_type=kind
        )
        return sums.astype(jnp.float32)

    blocks = scale.shape[0]
    if blocks == 1:
        y = product(values, weight) * scale[0, :, :, None]
    else:  # one after the other: all at once would be as many results

        def add(total: Array, block: Array) -> tuple[Array, None]:
            parts = (
                lax.dynamic_slice_in_dim(x, block * BLOCK, BLOCK, -1) for x in (values, weight)
            )
            return total + product(*parts) * scale[block, :, :, None], None

        zero = jnp.zeros((*values.shape[:-1], weight.shape[0]), jnp.float32)
        y, _ = lax.scan(add, zero, jnp.arange(blocks))
    y = finished(y, weight_scale, bias, gelu=gelu)
    return quantise(y, dtype, BLOCK) if dtype in LARGEST else y.astype(dtype)


def weight_matmul(
    x: Float[Array, "R T C"],
    weight: Shaped[Array, "O C"],
    weight_scale: Float[Array, "O"],
    bias: Float[Array, "O"] | None,
    *,
    gelu: bool,
    dtype: jnp.dtype,
) -> Float[Array, "R T O"]:
    """8-bit values are exact in every dtype that is computed in; products of float32 are, too."""
    sums = lax.dot_general(
        x,
        weight.astype(x.dtype),
        (((2,), (1,)), ((), ())),
        precision=lax.Precision.HIGHEST if x.dtype == jnp.float32 else None,
        preferred_element_type=jnp.float32,
    )
    return finished(sums, weight_scale, bias, gelu=gelu).astype(dtype)


def finished(
    sums: Float[Array, "R T O"],
    weight_scale: Float[Array, "O"] | None,
    bias: Float[Array, "O"] | None,
    *,
    gelu: bool,
) -> Float[Array, "R T O"]:
    """Sums in float32 with scales and biases of their outputs, perhaps through the tanh GELU."""
    y = sums if weight_scale is None else sums * weight_scale[None, None]
    y = y if bias is None else y + bias.astype(jnp.float32)[None, None]
    return jax.nn.gelu(y, approximate=True) if gelu else y
