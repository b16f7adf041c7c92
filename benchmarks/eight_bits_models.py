"""Models for the table of 8-bit products: variants of one, outliers planted, a naive scheme."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Collection, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sparvar_jax.models import eight_bits, layers
from sparvar_jax.models.eight_bits import Form
from sparvar_jax.models.layers import DtypeName
from sparvar_jax.pipelines.parts import abstract_module
from sparvar_jax.weights import checkpoint, matrix, storage

KINDS = ("qkv", "proj", "fc1", "fc2", "cross")
PRODUCTS = KINDS[:4]
OUTLIER, TAIL = 30.0, 20.0
"""How many times their size outlier channels are made, and four channels behind the GELU: the
largest values there, some 3 spreads of what enters it, are then 300 times the median and more."""


def kind_of(path: str) -> str:
    """The kind of layer of a kernel's path in a block."""
    return "cross" if ".cross." in path else path.split(".")[-2]


def in_dtype(transformer: Any, dtype: str) -> Any:
    """The same weights in a model that computes in another dtype."""
    config = dataclasses.replace(transformer.config, dtype=dtype)
    made = abstract_module(type(transformer), config)
    shapes = checkpoint.abstract_parameters(made)
    flat = storage.flatten(nnx.to_pure_dict(nnx.state(transformer)))
    return checkpoint.fill(made, {path: x.astype(shapes[path].dtype) for path, x in flat.items()})


def with_stream(transformer: Any, dtype: DtypeName) -> Any:
    """The same weights with a residual stream in another dtype."""
    made = nnx.merge(*nnx.split(transformer))
    made.config = dataclasses.replace(made.config, stream=dtype)
    return made


def rounded(transformer: Any, form: Form, kinds: Collection[str] = KINDS) -> Any:
    """The model with the kernels of some kinds in a form of `eight_bits`."""
    made = nnx.merge(*nnx.split(transformer))
    dtypes = eight_bits.kernels(made, form)
    eight_bits.narrow(made, {path: d for path, d in dtypes.items() if kind_of(path) in kinds})
    return made


def planted(transformer: Any) -> Any:
    """The model with outliers where trained ones have them; still one in float32.

    Each scale gets two channels of the residual stream of its own that are `OUTLIER` times the
    size of others, so that those of the inputs of qkv and fc1 move with the scale; in every block
    four channels behind the GELU are `TAIL` times theirs. What reads them is divided by as much, so
    that they matter as others do.
    """
    made = jax.tree.map(lambda leaf: leaf, transformer)  # parameters are changed in place
    draw = np.random.default_rng(0)
    levels = np.array(made.level_embed[...])
    channels = draw.permutation(levels.shape[1])[: 2 * len(levels)].reshape(len(levels), -1)
    for level, chosen in zip(levels, channels, strict=True):
        level[chosen] = OUTLIER
    made.level_embed[...] = jnp.asarray(levels)
    readers = [layer for block in made.blocks for layer in (block.attn.qkv, block.ffn.fc1)]
    for layer in (*readers, made.head):
        layer.kernel[...] = layer.kernel[...].at[channels.ravel()].divide(OUTLIER)
    for block in made.blocks:
        fc1, fc2 = block.ffn.fc1, block.ffn.fc2
        chosen = draw.choice(fc2.kernel[...].shape[0], 4, replace=False)
        fc1.kernel[...] = fc1.kernel[...].at[:, chosen].multiply(TAIL)
        assert fc1.bias is not None
        fc1.bias[...] = fc1.bias[...].at[chosen].multiply(TAIL)
        fc2.kernel[...] = fc2.kernel[...].at[chosen].divide(TAIL)
    return made


def per_tensor(transformer: Any) -> Any:
    """The model with the four products' matrices in int8 with one scale each, see `one_scale`."""
    made = nnx.merge(*nnx.split(transformer))
    for path, part in nnx.iter_modules(made):
        if isinstance(part, layers.Linear) and part.narrow and path[-1] in PRODUCTS:
            kernel = part.kernel[...].astype(jnp.float32)
            values, scale = _round(kernel)
            part.kernel = nnx.Param(values.astype(jnp.int8))
            part.kernel_scale = nnx.data(nnx.Param(jnp.full(kernel.shape[1], scale)))
    return made


@contextlib.contextmanager
def one_scale() -> Iterator[None]:
    """Inside, activations of `per_tensor` matrices are int8 with one scale a tensor, as naive
    schemes have it; from as many tokens on as other 8-bit products."""
    plain = matrix.product

    def product(x: Array, weight: Any, **how: Any) -> Array:
        if isinstance(weight, matrix.Scaled) and x.ndim == 3 and x.shape[1] >= matrix.FEWEST_TOKENS:
            values, scale = _round(x.astype(jnp.float32))
            x = (values * scale).astype(x.dtype)
        return plain(x, weight, **how)

    with mock.patch.object(matrix, "product", product):
        yield


def _round(x: Float[Array, "..."]) -> tuple[jax.Array, jax.Array]:
    scale = jnp.abs(x).max() / 127
    return jnp.round(x / scale), scale
