"""Public products of 8-bit operands, with a choice of implementation.

A matrix of activations is `Eight`: 8-bit values with one scale for each row, or for each row and
block of `BLOCK` columns. Weights have one scale for each output. int8 is summed exactly; e4m3 keeps
the relative precision of small values beside large ones, which long tails need.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

from pallas_kernels import backends, calls, support
from pallas_kernels.backends import Implementation
from pallas_kernels.xla import quantised as reference

__all__ = ["BLOCK", "Eight", "quantise", "quantised_matmul", "weight_matmul"]

BLOCK = reference.BLOCK
"""Columns that share a scale in the 8-bit results of `quantised_matmul`."""
LARGEST = reference.LARGEST
"""Dtypes of 8-bit values, and the largest value that each is scaled to."""


@typing.no_type_check  # jax rebuilds it with whatever stands for arrays
@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scale"), meta_fields=()
)
@dataclass(frozen=True)
class Eight:
    """Activations `values * scale`: int8 or e4m3, one scale a row (blocks 1) or row and block."""

    values: Shaped[Array, "R T C"]
    scale: Float[Array, "blocks R T"]


def quantise(
    x: Float[Array, "R T C"],
    dtype: DTypeLike,
    block: int | None = None,
    *,
    implementation: Implementation | None = None,
) -> Eight:
    """Rows, or blocks of their columns, as 8-bit multiples of their largest value.

    Rounds to nearest; rows of zeros stay zeros. Blocks are the compiler's alone. Raises ValueError
    for other dtypes, and for blocks that do not divide the columns.
    """
    _require_dtype(dtype)
    if block is None:
        call = calls.Quantise(device=support.device_of(x), x=x, dtype=jnp.dtype(dtype))
        return Eight(*backends.serve(call, implementation))
    if x.shape[-1] % block:
        raise ValueError(f"blocks of {block} must divide the columns; got {x.shape[-1]} columns")
    return Eight(*reference.quantise(x, jnp.dtype(dtype), block))


def quantised_matmul(
    x: Eight,
    weight: Shaped[Array, "O C"],
    weight_scale: Float[Array, "O"],
    bias: Float[Array, "O"] | None = None,
    *,
    gelu: bool = False,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> Float[Array, "R T O"] | Eight:
    """`x @ weight.T + bias`, perhaps through the tanh GELU, from 8-bit operands of one dtype.

    weight: its inputs innermost, as tensor cores take 8-bit operands. dtype: of the result; int8
    and e4m3 give `Eight` with a scale for each row and `BLOCK` columns.
    """
    _require_dtype(x.values.dtype)
    if weight.dtype != x.values.dtype:
        raise ValueError(f"operands must have one dtype; got {x.values.dtype} and {weight.dtype}")
    blocks, depth, dtype = x.scale.shape[0], weight.shape[1], jnp.dtype(dtype)
    if blocks not in (1, depth / BLOCK):
        raise ValueError(
            f"scales must be one a row, or one for each {BLOCK} columns; got {blocks} for {depth}"
        )
    if dtype in LARGEST and weight.shape[0] % BLOCK:
        raise ValueError(f"8-bit results need outputs in blocks of {BLOCK}; got {weight.shape[0]}")
    call = calls.QuantisedMatmul(
        device=support.device_of(x.values, weight), values=x.values, scale=x.scale, weight=weight,
        weight_scale=weight_scale, bias=bias, gelu=gelu, dtype=dtype,
    )  # fmt: skip
    out = backends.serve(call, implementation)
    return Eight(*out) if dtype in LARGEST else out


def weight_matmul(
    x: Float[Array, "R T C"],
    weight: Shaped[Array, "O C"],
    weight_scale: Float[Array, "O"],
    bias: Float[Array, "O"] | None = None,
    *,
    gelu: bool = False,
    implementation: Implementation | None = None,
) -> Float[Array, "R T O"]:
    """`x @ weight.T + bias` from 8-bit weights, perhaps through the tanh GELU, in the dtype of `x`.

    For few rows, whose products take as long as their weights take to be read; `x` stays as it is.
    Sums are of float32, times the scales once, and rounded at the end. Raises ValueError for
    weights of other dtypes.
    """
    _require_dtype(weight.dtype)
    call = calls.WeightMatmul(
        device=support.device_of(x, weight), x=x, weight=weight, weight_scale=weight_scale,
        bias=bias, gelu=gelu, dtype=x.dtype,
    )  # fmt: skip
    return backends.serve(call, implementation)


def _require_dtype(dtype: DTypeLike) -> None:
    if jnp.dtype(dtype) not in LARGEST:
        names = " or ".join(known.name for known in LARGEST)
        raise ValueError(f"8-bit values are {names}; got {jnp.dtype(dtype).name}")
