"""The parts of an Infinity block and of its text conditioning: thin modules, pure calls."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

import pallas_kernels
from pallas_kernels import Eight
from pallas_kernels.api import Implementation
from sparvar_jax.models import layers
from sparvar_jax.models.cross_attention import CrossAttention, Text
from sparvar_jax.models.groups import by_rows
from sparvar_jax.models.layers import DtypeName, Precision
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.stores import Writes

Rotary = tuple[jax.Array, jax.Array]
"""(cos, sin) of `schedule.rotary_channels`, each [T, D], or [R, T, D] of every row's own tokens."""
BlockInputs = tuple[jax.Array, Text]
"""What a block needs of a condition: adaptive-norm values [R2, 6, C] and the text."""

PRESETS = {  # depth, width, heads, chunks
    "infinity_2b": (32, 2048, 16, 8),
    "infinity_8b": (40, 3584, 28, 8),
    "infinity_layer12": (12, 768, 8, 4),
    "infinity_layer16": (16, 1152, 12, 4),
    "infinity_layer24": (24, 1536, 16, 4),
    "infinity_layer32": (32, 2080, 20, 4),
    "infinity_layer40": (40, 2688, 24, 4),
    "infinity_layer48": (48, 3360, 28, 4),
    "tiny": (4, 128, 2, 2),
}


@dataclasses.dataclass(frozen=True)
class InfinityConfig:
    """Shape and precision of an Infinity transformer.

    bits: bits of one token. patchify: a token covers 2x2 latents (bits are 4 times the code width).
    chunks: how the released checkpoints group blocks; it changes names in files, nothing else.
    stream: dtype of the residual stream.
    fused: which implementation serves the fused element-wise operations, None for the default.
    """

    depth: int
    width: int
    heads: int
    text_width: int = 2048
    bits: int = 32
    mlp_width: int = 0
    chunks: int = 1
    patchify: bool = False
    text_max_length: int = 512
    levels: int = 15
    dtype: DtypeName = "bfloat16"
    stream: DtypeName = "float32"
    fused: Implementation | None = None

    def __post_init__(self):
        if not self.mlp_width:
            # Python rounds half to even, as the released models do (layer32 and layer48 need it).
            object.__setattr__(self, "mlp_width", round(4 * self.width / 256) * 256)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        if self.depth % self.chunks:
            raise ValueError(f"depth {self.depth} must be divisible by chunks {self.chunks}")
        if self.text_width < 128 or self.width % self.pool_heads:
            raise ValueError(
                f"text width {self.text_width} gives {self.pool_heads} pool heads, which must be "
                f"at least 1 and divide the width {self.width}"
            )
        if self.patchify and self.bits % 4:
            raise ValueError(f"with patchify the bits must be a multiple of 4, got {self.bits}")

    @classmethod
    def preset(cls, name: str, **changes) -> InfinityConfig:
        """A released shape by name (`infinity_8b` has patchify); `changes` override fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        depth, width, heads, chunks = PRESETS[name]
        config = cls(depth, width, heads, chunks=chunks)
        if name == "infinity_8b":
            config = dataclasses.replace(config, bits=56, patchify=True)
        if name == "tiny":
            config = dataclasses.replace(config, text_width=256)
        return dataclasses.replace(config, **changes)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def pool_heads(self) -> int:
        return self.text_width // (64 if self.width > 4096 else 128)

    @property
    def code_width(self) -> int:
        """Channels of one latent code."""
        return self.bits // 4 if self.patchify else self.bits

    @property
    def logit_bound(self) -> float:
        """Cosine attention's logits never exceed the clamped temperature, 100."""
        return 100.0

    @property
    def precision(self) -> Precision:
        return Precision(self.dtype, self.stream)


class TextPool(nnx.Module):
    """Attentive pooling of a prompt's tokens into one vector."""

    def __init__(self, config: InfinityConfig, rngs: nnx.Rngs):
        heads, width = config.pool_heads, config.width
        single = jnp.float32
        self.query = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (heads, width // heads), single)
        )
        self.kv = layers.linear(
            config.text_width, 2 * width, config.precision, rngs, bias=False, weights=single
        )
        self.v_bias = nnx.Param(jnp.zeros((width,), single))
        self.proj = layers.linear(width, width, config.precision, rngs, weights=single)

    def __call__(
        self, text: Float[Array, "R M Ct"], mask: Bool[Array, "R M"], precision: Precision
    ) -> Float[Array, "R C"]:
        """Pooled text; softmax over each prompt's own tokens."""
        heads = self.query[...].shape[0]
        key, value = jnp.split(self.kv(text), 2, axis=-1)
        value = value + self.v_bias[...].astype(value.dtype)
        query = jnp.broadcast_to(
            self.query[...][None, :, None, :].astype(key.dtype),
            (text.shape[0], heads, 1, self.query[...].shape[1]),
        )
        pooled = layers.masked_attention(
            query,
            layers.split_heads(key, heads),
            layers.split_heads(value, heads),
            mask,
            precision,
        )
        return self.proj(layers.merge_heads(pooled))[:, 0].astype(jnp.float32)


class TextProjection(nnx.Module):
    """Two-layer map of text features to the transformer's width."""

    def __init__(self, config: InfinityConfig, rngs: nnx.Rngs):
        single = jnp.float32
        self.fc1 = layers.linear(
            config.text_width, config.width, config.precision, rngs, weights=single
        )
        self.fc2 = layers.linear(config.width, config.width, config.precision, rngs, weights=single)

    def __call__(self, text: Float[Array, "R M Ct"]) -> Float[Array, "R M C"]:
        return self.fc2(jax.nn.gelu(self.fc1(text), approximate=True))


class SelfAttention(nnx.Module):
    """Cosine self-attention with a learned temperature per head and 2D rotary positions."""

    def __init__(self, config: InfinityConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.precision.compute
        self.qkv = layers.linear(
            width, 3 * width, config.precision, rngs, bias=False, narrow="int8"
        )
        self.q_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.v_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.log_temperature = nnx.Param(jnp.full((config.heads,), jnp.log(4.0), dtype))
        self.proj = layers.linear(width, width, config.precision, rngs, narrow="int8")

    def __call__(
        self,
        x: Float[Array, "R T C"] | Eight,
        rotary: Rotary,
        attend: Attend,
        fused: Implementation | None,
    ) -> Float[Array, "R T C"]:
        """The output lacks `proj`'s bias, which the norm after it adds."""
        mine = attend.heads.columns
        qkv = attend.heads.gather(layers.product(self.qkv, x), 3)

        def write(keys: Array, values: Array, slot: Slot) -> tuple[Array, Array, Array]:
            return pallas_kernels.rotary_to_cache(
                qkv,
                mine(self.q_bias[...]),
                mine(self.v_bias[...]),
                mine(self.log_temperature[...]),
                *rotary,
                keys,
                values,
                **slot._asdict(),
                implementation=fused,
            )

        heads = mine(self.log_temperature[...]).shape[0]
        writes = Writes(write, lambda: layers.split_heads(jnp.split(qkv, 3, axis=-1)[0], heads))
        return layers.product(self.proj, layers.merge_heads(attend(writes).astype(qkv.dtype)))


class FeedForward(nnx.Module):
    """Two linear maps with tanh-approximated GELU between them; the second lacks its bias."""

    def __init__(self, width: int, hidden: int, precision: Precision, rngs: nnx.Rngs):
        self.fc1 = layers.linear(width, hidden, precision, rngs, narrow="int8")
        # What leaves the GELU has long tails, in which steps of one size lose everything else.
        self.fc2 = layers.linear(hidden, width, precision, rngs, narrow="float8_e4m3fn")

    def __call__(self, x: Float[Array, "R T C"] | Eight) -> Float[Array, "R T C"]:
        def of_some(x: Float[Array, "R2 T C"] | Eight) -> Float[Array, "R2 T C"]:
            return layers.product(self.fc2, layers.gelu_product(self.fc1, x, into=self.fc2))

        return by_rows(of_some, x)


class Block(nnx.Module):
    """Self-attention, cross-attention and feed-forward on the residual stream."""

    def __init__(self, config: InfinityConfig, rngs: nnx.Rngs):
        dtype = config.precision.compute
        self.ada_gss = nnx.Param(
            0.02 * jax.random.normal(rngs.params(), (6, config.width)).astype(dtype)
        )
        self.attn = SelfAttention(config, rngs)
        self.cross_norm = layers.Scale(config.width, bias=True, dtype=dtype)
        self.cross = CrossAttention(config.width, config.heads, config.precision, rngs)
        self.ffn = FeedForward(config.width, config.mlp_width, config.precision, rngs)

    def __call__(
        self,
        stream: Stream,
        inputs: BlockInputs,
        rotary: Rotary,
        attend: Attend,
        config: InfinityConfig,
    ) -> Stream:
        """The residual stream after this block (arXiv 2412.04431, figure 2).

        inputs: gains 1 and 2, scales 1 and 2, shifts 1 and 2 of the adaptive norms; the text.
        """
        fused, (values, text) = config.fused, inputs

        def self_attention(stream: Stream, rotary: Rotary) -> Stream:
            dtype = layers.input_dtype(self.attn.qkv, stream.x.shape[1])
            x, y = stream.normed(values, 2, 4, dtype, fused)
            out = self.attn(y, rotary, attend, fused)
            return Stream(x, out, values, layers.bias_of(self.attn.proj), index=0)

        def cross_attention(stream: Stream, rotary: Rotary) -> Stream:
            assert self.cross_norm.bias is not None
            x, y = pallas_kernels.residual_norm(
                stream.x,
                stream.branch,
                None if stream.table is None else (stream.table, stream.index),
                self.cross_norm.scale[...],
                self.cross_norm.bias[...],
                bias=stream.bias,
                dtype=config.precision.compute,
                one_plus=False,
                implementation=fused,
            )
            plain: Any = y
            return Stream(x, self.cross(plain, text, fused), None, layers.bias_of(self.cross.proj))

        def feed_forward(stream: Stream, rotary: Rotary) -> Stream:
            dtype = layers.input_dtype(self.ffn.fc1, stream.x.shape[1])
            x, y = stream.normed(values, 3, 5, dtype, fused)
            return Stream(x, self.ffn(y), values, layers.bias_of(self.ffn.fc2), index=1)

        for run in (self_attention, cross_attention, feed_forward):
            stream = attend.branch(run.__name__, run, stream, rotary)
        return stream
