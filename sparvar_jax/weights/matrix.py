"""Matrices of weights as values: dense, or 8-bit values with scales. Products ask for neither."""

from __future__ import annotations

import functools
import typing
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Shaped

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


Weight = Dense | Scaled


def product(
    x: Float[Array, "... I"],
    weight: Weight,
    *,
    dtype: DTypeLike,
    precision: jax.lax.Precision | None = None,
) -> Float[Array, "... O"]:
    """`x` times a matrix, computed and given in `dtype`.

    Of scaled values the sums are taken in float32 and multiplied by the scales once: 8-bit values
    are exact in every dtype that is computed in.
    """
    contract = (((x.ndim - 1,), (0,)), ((), ()))
    if isinstance(weight, Dense):
        kernel = weight.kernel.astype(dtype)
        return jax.lax.dot_general(x.astype(dtype), kernel, contract, precision=precision)
    sums = jax.lax.dot_general(
        x.astype(dtype),
        weight.values.astype(dtype),
        contract,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    return (sums * weight.scale.reshape((1,) * (x.ndim - 1) + (-1,))).astype(dtype)


def dense_of(weight: Weight, dtype: DTypeLike) -> Float[Array, "I O"]:
    """The matrix itself, for whoever multiplies it into something else."""
    if isinstance(weight, Dense):
        return weight.kernel.astype(dtype)
    return (weight.values.astype(jnp.float32) * weight.scale).astype(dtype)
