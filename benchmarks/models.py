"""Models with random weights in the released shapes, made on the device they run on.

Speed does not depend on the values, but zeros would be dishonest: matrix units draw less power on
them. Weights are normal, norms near one, temperatures the initial ones.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.var import Var
from sparvar_jax.models.var_parts import VarConfig
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig

TOKENIZERS = {"infinity_8b": "f8_d14"}
TEXT_TOKENS = 24  # a prompt of usual length


@functools.partial(jax.jit, static_argnames=("shape", "dtype", "spread", "centre"))
def _normal(key, *, shape, dtype, spread, centre):
    return (centre + spread * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def randomise(module: nnx.Module, seed: int) -> nnx.Module:
    """An abstract module (`nnx.eval_shape`) with random parameters on the default device."""
    state = nnx.state(module)
    leaves = []
    for path, leaf in nnx.to_flat_state(state):
        name = str(path[-1])
        spread = leaf.shape[0] ** -0.5 if name == "kernel" and len(leaf.shape) == 2 else 0.02
        if name == "kernel" and len(leaf.shape) == 4:
            spread = (leaf.shape[0] * leaf.shape[1] * leaf.shape[2]) ** -0.5
        centre = {"scale": 1.0, "log_temperature": 2.0}.get(name, 0.0)
        key = jax.random.key(seed ^ zlib.crc32("/".join(map(str, path)).encode()))
        value = _normal(key, shape=leaf.shape, dtype=leaf.dtype, spread=spread, centre=centre)
        leaves.append((path, leaf.replace(value)))
    nnx.update(module, nnx.from_flat_state(leaves))
    return module


def infinity(preset: str, *, dtype: str = "bfloat16", seed: int = 0, **changes: Any) -> Infinity:
    """An Infinity transformer of a released shape."""
    config = InfinityConfig.preset(preset, dtype=dtype, **changes)
    return randomise(nnx.eval_shape(lambda: Infinity(config, rngs=nnx.Rngs(0))), seed)  # type: ignore[return-value]


def tokenizer(preset: str, *, dtype: str = "bfloat16", seed: int = 1) -> BsqVae:
    """The image tokenizer that goes with a transformer preset."""
    config = BsqVaeConfig.preset(TOKENIZERS.get(preset, "f16_d32"), dtype=dtype)  # type: ignore[arg-type]
    return randomise(nnx.eval_shape(lambda: BsqVae(config, rngs=nnx.Rngs(0))), seed)  # type: ignore[return-value]


def var(preset: str, *, dtype: str = "bfloat16", seed: int = 0, **changes: Any) -> Var:
    """A class-conditional VAR transformer of a released shape."""
    config = VarConfig.preset(preset, dtype=dtype, **changes)
    return randomise(nnx.eval_shape(lambda: Var(config, rngs=nnx.Rngs(0))), seed)  # type: ignore[return-value]


def vqvae(*, dtype: str = "bfloat16", seed: int = 1) -> Vqvae:
    """The VQVAE of all VAR models."""
    config = VqvaeConfig(dtype=dtype)  # type: ignore[arg-type]
    return randomise(nnx.eval_shape(lambda: Vqvae(config, rngs=nnx.Rngs(0))), seed)  # type: ignore[return-value]


def without_kernels(model: Any) -> Any:
    """The same weights with the fused operations left to XLA."""
    plain = nnx.merge(*nnx.split(model))
    plain.config = dataclasses.replace(model.config, fused="xla")
    return plain


def text_features(batch: int, width: int, seed: int = 2) -> tuple[jax.Array, jax.Array]:
    """Random text-encoder states [B, M, Ct] and their lengths."""
    key = jax.random.key(seed)
    text = jax.random.normal(key, (batch, TEXT_TOKENS, width), jnp.float32)
    return text, jnp.full((batch,), TEXT_TOKENS, jnp.int32)
