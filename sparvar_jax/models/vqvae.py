"""The vector-quantised tokenizer of class-conditional VAR: image to token maps and back.

Maps are NHWC, kernels HWIO. The network is the convolutional one of `bsq_vae` with attention at its
lowest resolution. Codes are rows of a codebook; those of a coarse scale are enlarged (bicubic),
smoothed by a convolution that neighbouring scales share, and summed. The codebook, everything that
touches the sum, the encoder and the decoder's last layer are float32 in every mode.
"""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Shaped

from sparvar_jax.models import quantizer
from sparvar_jax.models.conv_parts import (
    Conv,
    Dtype,
    GroupNorm,
    Level,
    ResBlock,
    norm_groups,
)

_EXACT = jax.lax.Precision.HIGHEST


@dataclasses.dataclass(frozen=True)
class VqvaeConfig:
    """Shape of a VQVAE; the defaults are the released one.

    blocks: residual blocks of an encoder level (a decoder level has one more). Every level but the
    last halves the resolution. phis: convolutions that the scales share. residual: the share of
    such a convolution in the smoothed codes.
    """

    vocab: int = 4096
    code_width: int = 32
    base_width: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    phis: int = 4
    residual: float = 0.5
    dtype: Dtype = "float32"

    def __post_init__(self):
        if min(self.vocab, self.code_width, self.blocks, self.phis, len(self.multipliers)) < 1:
            raise ValueError(f"tokenizer sizes must be positive, got {self}")
        for multiplier in self.multipliers:
            norm_groups(self.base_width * multiplier)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"tokenizer dtype must be float32 or bfloat16, got {self.dtype!r}")

    @property
    def stride(self) -> int:
        """Pixels of a side that one latent covers."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def full_width(self) -> int:
        """Channels of the decoder at full resolution."""
        return self.base_width * self.multipliers[0]

    def phi(self, scale: int, scales: int) -> int:
        """Which shared convolution smooths a scale's codes: the one whose tick is nearest."""
        edge = (1 / 3 if self.phis == 4 else 1 / 2) / self.phis
        ticks = np.linspace(edge, 1 - edge, self.phis)
        return int(np.argmin(np.abs(ticks - scale / (scales - 1))))


class PixelAttention(nnx.Module):
    """Single-head attention over all pixels, added to its input; softmax in float32."""

    def __init__(self, width: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.norm = GroupNorm(width)
        self.qkv = Conv(width, 3 * width, 1, dtype=dtype, rngs=rngs)
        self.proj = Conv(width, width, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B height width C"]:
        batch, _, _, width = x.shape
        qkv = self.qkv(self.norm(x))
        q, k, v = jnp.split(qkv.reshape(batch, -1, 3 * width), 3, axis=-1)
        precision = _EXACT if qkv.dtype == jnp.float32 else None
        scores = jnp.einsum(
            "btc,bsc->bts", q, k, precision=precision, preferred_element_type=jnp.float32
        )
        weights = jax.nn.softmax(scores * width**-0.5, axis=-1).astype(v.dtype)
        out = jnp.einsum("bts,bsc->btc", weights, v, precision=precision)
        return x + self.proj(out.reshape(x.shape))


class AttentiveLevel(Level):
    """The lowest resolution, where attention follows every block."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        change: Literal["upsample"] | None,
        *,
        dtype: Dtype,
        rngs: nnx.Rngs,
    ):
        super().__init__(inputs, outputs, blocks, change, dtype=dtype, rngs=rngs)
        self.attn = nnx.List(
            [PixelAttention(outputs, dtype=dtype, rngs=rngs) for _ in range(blocks)]
        )

    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B h w Co"]:
        for block, attention in zip(self.block, self.attn, strict=True):
            x = attention(block(x))
        return x if self.upsample is None else self.upsample.doubled(x)


class Middle(nnx.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, width: int, *, dtype: Dtype, rngs: nnx.Rngs):
        self.block = nnx.List([ResBlock(width, width, dtype=dtype, rngs=rngs) for _ in range(2)])
        self.attn = PixelAttention(width, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "B height width C"]) -> Float[Array, "B height width C"]:
        return self.block[1](self.attn(self.block[0](x)))


class Encoder(nnx.Module):
    """Image to latent; every level but the last halves the resolution."""

    def __init__(self, config: VqvaeConfig, *, rngs: nnx.Rngs):
        dtype, width = config.dtype, config.base_width
        self.conv_in = Conv(3, width, dtype=dtype, rngs=rngs)
        levels = []
        for multiplier in config.multipliers[:-1]:
            inputs, width = width, config.base_width * multiplier
            levels.append(Level(inputs, width, config.blocks, "downsample", dtype=dtype, rngs=rngs))
        inputs, width = width, config.base_width * config.multipliers[-1]
        levels.append(AttentiveLevel(inputs, width, config.blocks, None, dtype=dtype, rngs=rngs))
        self.down = nnx.List(levels)
        self.mid = Middle(width, dtype=dtype, rngs=rngs)
        self.norm_out = GroupNorm(width)
        self.conv_out = Conv(width, config.code_width, dtype=dtype, rngs=rngs)

    def __call__(self, image: Float[Array, "B height width 3"]) -> Float[Array, "B h w N"]:
        x = self.conv_in(image)
        for level in self.down:
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(self.mid(x))))


class Decoder(nnx.Module):
    """Latent to image; levels are numbered from full resolution and run backwards."""

    def __init__(self, config: VqvaeConfig, *, rngs: nnx.Rngs):
        dtype, last = config.dtype, len(config.multipliers) - 1
        width = config.base_width * config.multipliers[-1]
        self.conv_in = Conv(config.code_width, width, dtype=dtype, rngs=rngs)
        self.mid = Middle(width, dtype=dtype, rngs=rngs)
        levels = []
        for index, multiplier in reversed(list(enumerate(config.multipliers))):
            inputs, width = width, config.base_width * multiplier
            kind = AttentiveLevel if index == last else Level
            change = "upsample" if index else None
            levels.append(kind(inputs, width, config.blocks + 1, change, dtype=dtype, rngs=rngs))
        self.up = nnx.List(levels[::-1])
        self.norm_out = GroupNorm(width)
        # bfloat16 has a step of 1/256 just below one, the step of the final picture.
        exact = config.dtype == "float32"
        self.conv_out = Conv(width, 3, dtype="float32", exact=exact, rngs=rngs)

    def __call__(self, latent: Float[Array, "B h w N"]) -> Float[Array, "B height width 3"]:
        x = self.mid(self.conv_in(latent))
        for level in reversed(list(self.up)):
            x = level(x)
        return self.conv_out(jax.nn.silu(self.norm_out(x)))


class Codebook(nnx.Module):
    """Token ids to codes, and codes into the running sum."""

    def __init__(self, config: VqvaeConfig, *, rngs: nnx.Rngs):
        self.config = config
        shape = (config.vocab, config.code_width)
        self.codes = nnx.Param(jax.random.normal(rngs.params(), shape, jnp.float32))
        self.phi = nnx.List(
            [
                Conv(config.code_width, config.code_width, dtype="float32", rngs=rngs)
                for _ in range(config.phis)
            ]
        )

    def lookup(self, tokens: Shaped[Array, "B T ..."]) -> Float[Array, "B T N"]:
        """The codes of token ids [B, T], or their mixtures by weights [B, T, vocab]."""
        codes = self.codes[...]
        if tokens.ndim == 3:
            return jnp.einsum("btv,vn->btn", tokens, codes, precision=_EXACT)
        return codes[tokens]

    def nearest(self, x: Float[Array, "B T N"]) -> Int[Array, "B T"]:
        """The id of the codebook row nearest to each vector in Euclidean distance."""
        codes = self.codes[...]
        product = jnp.einsum("btn,vn->btv", x, codes, precision=_EXACT)
        distance = jnp.sum(x * x, -1, keepdims=True) + jnp.sum(codes * codes, -1) - 2 * product
        return jnp.argmin(distance, axis=-1).astype(jnp.int32)

    def add(
        self,
        code_sum: Float[Array, "B height width N"],
        codes: Float[Array, "B h w N"],
        scale: int,
        scales: int,
    ) -> Float[Array, "B height width N"]:
        """The running sum with one scale's codes added: enlarged, then smoothed."""
        size = (code_sum.shape[1], code_sum.shape[2])
        codes, share = quantizer.resize(codes, size, "bicubic"), self.config.residual
        smooth = self.phi[self.config.phi(scale, scales)](codes)
        return code_sum + ((1 - share) * codes + share * smooth)


class Tokenised(NamedTuple):
    """An image as token maps. tokens: ids of every scale. code_sum: what the decoder reads.

    inputs: the transformer's input codes of every scale but the first.
    """

    tokens: tuple[Int[Array, "B _"], ...]
    code_sum: Float[Array, "B height width N"]
    inputs: tuple[Float[Array, "B _ N"], ...]


class Vqvae(nnx.Module):
    """Encoder, codebook and decoder. Its methods are pure: call them under `jax.jit`."""

    def __init__(self, config: VqvaeConfig, *, rngs: nnx.Rngs):
        self.config, width = config, config.code_width
        # The encoder serves editing alone, where a rounded latent would change known tokens.
        single = dataclasses.replace(config, dtype="float32")
        self.encoder = Encoder(single, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Conv(width, width, dtype="float32", rngs=rngs)
        self.post_quant_conv = Conv(width, width, dtype=config.dtype, rngs=rngs)
        self.codebook = Codebook(config, rngs=rngs)

    def encode(self, image: Float[Array, "B height width 3"]) -> Float[Array, "B h w N"]:
        """Latent, float32, of RGB images in [-1, 1]; both sides must be multiples of the stride."""
        height, width = image.shape[1:3]
        if height % self.config.stride or width % self.config.stride:
            raise ValueError(
                f"image sides must be multiples of {self.config.stride}, got {height}x{width}: "
                "resize or crop the image first"
            )
        return self.quant_conv(self.encoder(image)).astype(jnp.float32)

    def tokenise(self, latent: Float[Array, "B h w N"], sides: tuple[int, ...]) -> Tokenised:
        """Token maps of a latent, from coarse to fine; the last side must be the latent's own."""
        batch, height, width, channels = latent.shape
        if height != width or height != sides[-1]:
            raise ValueError(
                f"token maps of side {sides[-1]} need pictures of "
                f"{sides[-1] * self.config.stride} pixels a side, got a latent of {height}x{width}"
            )
        code_sum, tokens, inputs = jnp.zeros_like(latent), [], []
        for scale, side in enumerate(sides):
            if scale:
                grid = quantizer.next_input(code_sum, (side, side), mode="area")
                inputs.append(grid.reshape(batch, side * side, channels))
            rest = quantizer.resize(latent - code_sum, (side, side), "area")
            tokens.append(self.codebook.nearest(rest.reshape(batch, side * side, channels)))
            codes = self.codebook.lookup(tokens[-1]).reshape(rest.shape)
            code_sum = self.codebook.add(code_sum, codes, scale, len(sides))
        return Tokenised(tuple(tokens), code_sum, tuple(inputs))

    def decode(self, code_sum: Float[Array, "B h w N"]) -> Float[Array, "B height width 3"]:
        """RGB images, float32, clamped to [-1, 1], from sums of codes."""
        return jnp.clip(self.decoder(self.post_quant_conv(code_sum)), -1, 1)
