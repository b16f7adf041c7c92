"""Models with matrices in 8 bits: which ones those are, in which dtypes, and how they become so.

A form names what the matrices become that say how (`Linear.narrow`): "int8" what they say, which
keeps int8 for inputs of one size and e4m3 behind the GELU; "fp8" e4m3 in all 8-bit products.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Shaped

from sparvar_jax.models.layers import EightBits, Linear
from sparvar_jax.weights import matrix

Form = Literal["int8", "fp8"]
FORMS: tuple[Form, ...] = get_args(Form)
WEIGHTS: EightBits = "int8 weights"


def kernels(module: nnx.Module, form: Form = "int8") -> dict[str, EightBits]:
    """Dotted paths of the kernels that take 8 bits, and the dtype that each takes."""
    found: dict[str, EightBits] = {}
    for path, part in nnx.iter_modules(module):
        if isinstance(part, Linear) and part.narrow is not None:
            as_said = form == "int8" or part.narrow == WEIGHTS
            found[_kernel(path)] = part.narrow if as_said else "float8_e4m3fn"
    return found


def form_of(module: nnx.Module) -> Form | None:
    """The form of a module, with weights or abstract; None where no product takes 8 bits.

    Modules that have nothing but weights rounded are alike in all forms: the first stands for them.
    """
    maps = [
        part
        for _, part in nnx.iter_modules(module)
        if isinstance(part, Linear) and part.narrow is not None
    ]
    found = {part.narrow for part in maps if part.is_narrow}
    if found:
        return "int8" if "int8" in found else "fp8"
    rounded = all(part.narrow == WEIGHTS and part.kernel_scale is not None for part in maps)
    return FORMS[0] if maps and rounded else None


def narrow(module: nnx.Module, dtypes: Mapping[str, EightBits]) -> None:
    """Round the kernels at these paths (see `kernels`) to 8 bits, one after the other, in place.

    module: with weights, or abstract. What is 8 bits already stays as it is.
    """
    for path, part in nnx.iter_modules(module):
        name = _kernel(path)
        if not isinstance(part, Linear) or name not in dtypes or part.kernel_scale is not None:
            continue
        (kernel,) = jax.tree.leaves(part.kernel)
        make = functools.partial(_narrow, dtype=dtypes[name])
        abstract = isinstance(kernel, jax.ShapeDtypeStruct)
        made = jax.eval_shape(make, kernel) if abstract else make(kernel)
        part.kernel, part.kernel_scale = nnx.Param(made.values), nnx.data(nnx.Param(made.scale))
        part.narrow, part.is_narrow = dtypes[name], isinstance(made, matrix.Narrow)


def rounded(
    arrays: Iterable[tuple[str, Array]], dtypes: Mapping[str, EightBits]
) -> Iterator[tuple[str, Array]]:
    """Parameters by dotted path, those of `dtypes` as 8-bit values and, at `PATH_scale`, scales.

    Each is waited for before the next is asked for, so that no two matrices lie there in full.
    """
    for path, array in arrays:
        if path not in dtypes:
            yield path, array
            continue
        made = jax.block_until_ready(_narrow(array, dtype=dtypes[path]))
        del array
        yield path, made.values
        yield f"{path}_scale", made.scale


def dense(
    values: Shaped[np.ndarray, "..."], scale: Float[np.ndarray, "O"], dtype: EightBits
) -> Float[np.ndarray, "I O"]:
    """The float32 matrix [inputs, outputs] that 8-bit values of `kernels` stand for."""
    matrix = values if dtype == WEIGHTS else values.T
    return matrix.astype(np.float32) * scale


def keep_stored(module: nnx.Module, paths: Collection[str]) -> None:
    """Make the linear maps whose kernels have these dotted paths expect 8-bit values with scales.

    module: abstract, about to be filled. A kernel of anything else is left as it is; activations
    stay as they are, see `weights.matrix`.
    """
    for path, part in nnx.iter_modules(module):
        if isinstance(part, Linear) and _kernel(path) in paths:
            (kernel,) = jax.tree.leaves(part.kernel)
            shape = kernel.shape
            values: Any = nnx.Param(jax.ShapeDtypeStruct(shape, jnp.int8))
            scale: Any = nnx.Param(jax.ShapeDtypeStruct(shape[-1:], jnp.float32))
            part.kernel, part.kernel_scale = values, nnx.data(scale)


def _kernel(path: Iterable[Any]) -> str:
    return ".".join(map(str, (*path, "kernel")))


@functools.partial(jax.jit, static_argnames="dtype")
def _narrow(kernel: Array, *, dtype: EightBits) -> matrix.Narrow | matrix.Scaled:
    return matrix.scaled(kernel) if dtype == WEIGHTS else matrix.narrow(kernel, jnp.dtype(dtype))
