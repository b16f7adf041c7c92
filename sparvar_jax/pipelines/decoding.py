"""Sums of codes to pictures, so many at once that the decoder's maps stay small."""

from __future__ import annotations

from typing import Any

from jaxtyping import Array, Float, UInt8

from sparvar_jax.models import bsq_vae
from sparvar_jax.models.bands import WHOLE, Bands
from sparvar_jax.models.groups import in_groups

PIXELS_AT_ONCE = 1 << 20
"""One picture of 1024x1024 fills an H100; more at once take memory and save no time."""


def pictures_at_once(batch: int, pixels: int) -> int:
    """How many pictures of so many pixels are decoded together."""
    return max(1, min(batch, PIXELS_AT_ONCE // pixels))


def decode(
    tokenizer: Any, code_sum: Float[Array, "B h w Cd"], bands: Bands = WHOLE
) -> UInt8[Array, "B height width 3"]:
    """RGB pictures, group after group; call it under `jax.jit`.

    bands: of the pictures' rows, where devices divide them.
    """

    def together(codes: Float[Array, "B2 h w Cd"]) -> UInt8[Array, "B2 height width 3"]:
        decode_band = getattr(tokenizer, "decode_band", None)
        if decode_band is None:  # this tokenizer's pictures are not divided
            return bands.own(bsq_vae.to_uint8(tokenizer.decode(codes)))
        return bsq_vae.to_uint8(decode_band(bands.own(codes), bands))

    batch, height, width = code_sum.shape[:3]
    group = pictures_at_once(batch, height * width * tokenizer.config.stride**2)
    return in_groups(together, code_sum, group)


def look_at(tokenizer: Any, code_sum: Float[Array, "B h w Cd"]) -> Float[Array, "B height width 3"]:
    """Pictures in [-1, 1], all at once: what plans with a route look at, which is small."""
    return tokenizer.decode(code_sum)
