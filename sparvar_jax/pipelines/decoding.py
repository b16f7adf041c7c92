"""Sums of codes to pictures, so many at once that the decoder's maps stay small."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from sparvar_jax.models import bsq_vae

PIXELS_AT_ONCE = 1 << 20
"""One picture of 1024x1024 fills an H100; more at once take memory and save no time."""


def pictures_at_once(batch: int, pixels: int) -> int:
    """How many pictures of so many pixels are decoded together."""
    return max(1, min(batch, PIXELS_AT_ONCE // pixels))


def decode(tokenizer: Any, code_sum: Float[Array, "B h w Cd"]) -> UInt8[Array, "B height width 3"]:
    """RGB pictures, group after group; call it under `jax.jit`."""

    def together(codes: Float[Array, "B2 h w Cd"]) -> UInt8[Array, "B2 height width 3"]:
        return bsq_vae.to_uint8(tokenizer.decode(codes))

    batch, height, width = code_sum.shape[:3]
    group = pictures_at_once(batch, height * width * tokenizer.config.stride**2)
    if group == batch:
        return together(code_sum)
    whole = batch // group * group
    groups = code_sum[:whole].reshape(-1, group, *code_sum.shape[1:])
    pictures = jax.lax.map(together, groups)
    pictures = pictures.reshape(whole, *pictures.shape[2:])
    if whole == batch:
        return pictures
    return jnp.concatenate([pictures, together(code_sum[whole:])])
