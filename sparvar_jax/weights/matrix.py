"""Matrices of weights as values: dense, or 8-bit values with scales. Products ask for neither.

`Scaled` matrices save memory: activations stay as they are. `Narrow` ones save time as well, for
activations are rounded to 8 bits too, from `FEWEST_TOKENS` on, where products are bound by
arithmetic. Below they stay as they are: products are bound by the weights they read, and the few
tokens of the first scales decide what all others draw.
"""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

import pallas_kernels
from pallas_kernels import Eight
from pallas_kernels.api import Implementation

_register = functools.partial(jax.tree_util.register_dataclass, meta_fields=())


@typing.no_type_check  # jax rebuilds it with whatever stands for arrays
@functools.partial(_register, data_fields=("kernel",))
@dataclass(frozen=True)
class Dense:
    """A matrix [I, O] as it is."""

    kernel: Float[Array, "I O"]


@typing.no_type_check
@functools.partial(_register, data_fields=("values", "scale"))
@dataclass(frozen=True)
class Scaled:
    """A matrix [I, O] of 8-bit values, times one scale for each output."""

    values: Shaped[Array, "I O"]
    scale: Float[Array, "O"]


@typing.no_type_check
@functools.partial(_register, data_fields=("values", "scale"))
@dataclass(frozen=True)
class Narrow:
    """A matrix [I, O] of 8-bit values, inputs innermost as tensor cores take them, with scales."""

    values: Shaped[Array, "O I"]
    scale: Float[Array, "O"]


Weight = Dense | Scaled | Narrow
FEWEST_TOKENS = 256


def narrow(kernel: Float[Array, "I O"], dtype: DTypeLike) -> Narrow:
    """A matrix rounded to int8 or e4m3, every output scaled to the largest value of the dtype."""
    # By the reference everywhere, so that a matrix is rounded alike on all machines.
    rows = pallas_kernels.quantise(kernel.T[None], dtype, implementation="xla")
    return Narrow(rows.values[0], rows.scale[0, 0])


def scaled(kernel: Float[Array, "I O"]) -> Scaled:
    """A matrix rounded to int8, for activations that stay as they are."""
    rows = narrow(kernel, jnp.int8)
    return Scaled(rows.values.T, rows.scale)


def takes_eight_bits(x: Float[Array, "... I"], weight: Weight) -> bool:
    """Whether activations are to meet this matrix as one 8-bit number each."""
    return isinstance(weight, Narrow) and x.ndim == 3 and x.shape[1] >= FEWEST_TOKENS


def eight_bit_product(
    x: Float[Array, "R T I"] | Eight,
    weight: Weight,
    *,
    bias: Float[Array, "O"] | None = None,
    gelu: bool = False,
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> Float[Array, "R T O"] | Eight:
    """`x` in 8 bits, perhaps already, times a narrow matrix: `pallas_kernels.quantised_matmul`."""
    assert isinstance(weight, Narrow)
    if not isinstance(x, Eight):
        x = pallas_kernels.quantise(x, weight.values.dtype)
    return pallas_kernels.quantised_matmul(
        x, weight.values, weight.scale, bias, gelu=gelu, dtype=dtype,
        implementation=implementation,
    )  # fmt: skip


def product_of_few(
    x: Float[Array, "R T I"],
    weight: Narrow,
    *,
    bias: Float[Array, "O"] | None = None,
    gelu: bool = False,
    dtype: DTypeLike,
    implementation: Implementation | None = None,
) -> Float[Array, "R T O"]:
    """`x` as it is times a narrow matrix: `pallas_kernels.weight_matmul`."""
    return pallas_kernels.weight_matmul(
        x.astype(dtype), weight.values, weight.scale, bias, gelu=gelu,
        implementation="xla" if implementation == "xla" else None,  # not every kernel set has it
    )  # fmt: skip


def product(
    x: Float[Array, "... I"],
    weight: Weight,
    *,
    dtype: DTypeLike,
    precision: jax.lax.Precision | None = None,
    result: DTypeLike | None = None,
) -> Float[Array, "... O"]:
    """`x` times a matrix, computed in `dtype`; activations stay as they are.

    result: the dtype it is given in, None for `dtype`; sums are not rounded on the way. Of scaled
    values the sums are taken in float32 and multiplied by the scales once: 8-bit values are exact
    in every dtype that is computed in.
    """
    inner = 1 if isinstance(weight, Narrow) else 0
    contract = (((x.ndim - 1,), (inner,)), ((), ()))
    if isinstance(weight, Dense):
        kernel = weight.kernel.astype(dtype)
        return jax.lax.dot_general(
            x.astype(dtype), kernel, contract, precision=precision, preferred_element_type=result
        )
    sums = jax.lax.dot_general(
        x.astype(dtype),
        weight.values.astype(dtype),
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    scaled = sums * weight.scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return scaled.astype(dtype if result is None else result)


def dense_of(weight: Weight, dtype: DTypeLike) -> Float[Array, "I O"]:
    """The matrix itself, for whoever multiplies it into something else."""
    if isinstance(weight, Dense):
        return weight.kernel.astype(dtype)
    values = weight.values.T if isinstance(weight, Narrow) else weight.values
    return (values.astype(jnp.float32) * weight.scale).astype(dtype)
