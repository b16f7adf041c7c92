"""The BSQ image tokenizer: a convolutional encoder and decoder around the bitwise quantiser.

Maps are NHWC, kernels HWIO. There is no attention; the encoder gives the latent itself (no mean and
variance) and the decoder takes the quantiser's sum of codes, without any scale or shift between
them. `models.quantizer` turns latents into bits. Group statistics, and the decoder's last layer,
are float32 in every mode; the other layers compute in `BsqVaeConfig.dtype`.
"""

from dataclasses import dataclass
from typing import get_args

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, UInt8

from sparvar_jax.models.bands import WHOLE, Bands
from sparvar_jax.models.conv_parts import (
    Conv,
    Dtype,
    GroupNorm,
    Level,
    ResBlock,
    norm_groups,
)


@dataclass(frozen=True)
class BsqVaeConfig:
    """Shape of a tokenizer; defaults are what all released ones share.

    `stride` is the number of pixels a latent covers per axis, a power of two. The deepest
    `log2(stride)` of the levels change resolution, one level per multiplier of `base_width`.
    """

    code_width: int
    stride: int
    encoder_multipliers: tuple[int, ...]
    decoder_multipliers: tuple[int, ...]
    base_width: int = 128
    encoder_blocks: int = 2
    decoder_blocks: int = 3
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        if self.stride < 1 or self.stride & (self.stride - 1):
            raise ValueError(f"tokenizer stride must be a power of two, got {self.stride}")
        if min(self.code_width, self.base_width, self.encoder_blocks, self.decoder_blocks) < 1:
            raise ValueError(f"tokenizer widths and block counts must be positive, got {self}")
        for name in ("encoder_multipliers", "decoder_multipliers"):
            multipliers = getattr(self, name)
            if len(multipliers) <= self.halvings:
                raise ValueError(
                    f"stride {self.stride} needs at least {self.halvings + 1} {name}, "
                    f"got {multipliers}"
                )
            for multiplier in multipliers:
                norm_groups(self.base_width * multiplier)
        if self.dtype not in get_args(Dtype):
            raise ValueError(f"tokenizer dtype must be one of {get_args(Dtype)}, got {self.dtype}")

    @property
    def halvings(self) -> int:
        """How many times the encoder halves the resolution: log2 of the stride."""
        return self.stride.bit_length() - 1

    @property
    def full_width(self) -> int:
        """Channels of the decoder at full resolution."""
        return self.base_width * self.decoder_multipliers[0]

    @classmethod
    def preset(cls, name: str, *, dtype: Dtype = "float32") -> "BsqVaeConfig":
        """A released tokenizer: `f16_d16`, `f16_d24`, `f16_d32`, `f16_d64` or `f8_d14`."""
        if name not in PRESETS:
            raise ValueError(f"tokenizer preset must be one of {sorted(PRESETS)}, got {name!r}")
        stride, code_width, multipliers = PRESETS[name]
        return cls(code_width, stride, multipliers, multipliers, dtype=dtype)


PRESETS = {
    "f16_d16": (16, 16, (1, 2, 4, 4, 4)),
    "f16_d24": (16, 24, (1, 2, 4, 4, 4)),
    "f16_d32": (16, 32, (1, 2, 4, 4, 4)),
    "f16_d64": (16, 64, (1, 2, 4, 4, 4)),
    "f8_d14": (8, 14, (1, 2, 4, 4)),
}


class Encoder(nnx.Module):
    """Image to latent."""

    def __init__(self, config: BsqVaeConfig, *, rngs: nnx.Rngs) -> None:
        dtype = config.dtype
        width = config.base_width
        self.conv_in = Conv(3, width, dtype=dtype, rngs=rngs)
        levels = []
        for index, multiplier in enumerate(config.encoder_multipliers):
            inputs, width = width, config.base_width * multiplier
            change = "downsample" if index < config.halvings else None
            levels.append(
                Level(inputs, width, config.encoder_blocks, change, dtype=dtype, rngs=rngs)
            )
        self.down = nnx.List(levels)
        self.mid = nnx.List([ResBlock(width, width, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.norm_out = GroupNorm(width)
        self.conv_out = Conv(width, config.code_width, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "B height width 3"]) -> Float[Array, "B h w Cd"]:
        x = self.conv_in(image)
        for layer in (*self.down, *self.mid):
            x = layer(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Decoder(nnx.Module):
    """Sum of codes to image; levels are numbered from full resolution and run backwards."""

    def __init__(self, config: BsqVaeConfig, *, rngs: nnx.Rngs) -> None:
        dtype = config.dtype
        width = config.base_width * config.decoder_multipliers[-1]
        self.conv_in = Conv(config.code_width, width, dtype=dtype, rngs=rngs)
        self.mid = nnx.List([ResBlock(width, width, dtype=dtype, rngs=rngs) for _ in range(2)])
        levels = []
        for index, multiplier in reversed(list(enumerate(config.decoder_multipliers))):
            inputs, width = width, config.base_width * multiplier
            change = "upsample" if 1 <= index <= config.halvings else None
            levels.append(
                Level(inputs, width, config.decoder_blocks, change, dtype=dtype, rngs=rngs)
            )
        self.up = nnx.List(reversed(levels))
        self.norm_out = GroupNorm(width)
        # bfloat16 has a step of 1/256 just below one, the step of the final picture. Products of
        # the bfloat16 mode may use tf32, whose inputs are finer than the activations feeding it.
        exact = config.dtype == "float32"
        self.conv_out = Conv(width, 3, dtype="float32", exact=exact, rngs=rngs)

    def __call__(
        self, codes: Float[Array, "B h w Cd"], bands: Bands = WHOLE
    ) -> Float[Array, "B height width 3"]:
        x = self.conv_in(codes, bands=bands)
        for layer in (*self.mid, *reversed(list(self.up))):
            x = layer(x, bands)
        return self.conv_out(jax.nn.silu(self.norm_out(x, bands)), bands=bands)


class BsqVae(nnx.Module):
    """Encoder and decoder of a tokenizer. Its methods are pure: call them under `jax.jit`."""

    def __init__(self, config: BsqVaeConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)

    def encode(self, image: Float[Array, "B height width 3"]) -> Float[Array, "B h w Cd"]:
        """Latent, float32, of RGB images in [-1, 1]; both sides must be multiples of the stride."""
        height, width = image.shape[1:3]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"image sides must be multiples of {self.config.stride}, got {height}x{width}: "
                "resize or crop the image first"
            )
        return self.encoder(image).astype(jnp.float32)

    def decode(self, code_sum: Float[Array, "B h w Cd"]) -> Float[Array, "B height width 3"]:
        """RGB images, float32, clamped to [-1, 1], from sums of codes (or from latents)."""
        return self.decode_band(code_sum, WHOLE)

    def decode_band(
        self, codes: Float[Array, "B h w Cd"], bands: Bands
    ) -> Float[Array, "B height width 3"]:
        """This device's band of images, from its band of the sums of codes."""
        return jnp.clip(self.decoder(codes, bands), -1, 1)


def to_uint8(image: Float[Array, "B height width 3"]) -> UInt8[Array, "B height width 3"]:
    """Pictures 0 to 255 from images in [-1, 1]; truncates as the released code does."""
    return ((image + 1) / 2 * 255).astype(jnp.uint8)
