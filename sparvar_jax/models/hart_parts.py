"""The shape of a HART transformer, and the parts of its blocks: thin modules, pure calls."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from sparvar_jax.models import layers
from sparvar_jax.models.groups import by_rows
from sparvar_jax.models.layers import DtypeName, Precision
from sparvar_jax.models.residual_head import ResidualShape
from sparvar_jax.models.stream import Stream, updated
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.schedule import Scale, ScaleSchedule
from sparvar_jax.plans.stores import write_rows

SIDES_1024 = (1, 2, 3, 4, 5, 7, 9, 12, 16, 21, 27, 36, 48, 64)
HEAD_DIM = 64
ATTENTION_SCALE = 0.25  # of the usual softmax scale, as in plain VAR
ROTARY_BASE = 10000.0
TOP_K, LATE_TOP_K, LATE_SCALE = 600, 300, 7

Rotary = tuple[jax.Array, jax.Array]
"""(cos, sin) of every row's own tokens [R, T, D]: rows have prompts of different lengths."""


def mlp_width(width: int, ratio: float = 4.0) -> int:
    """The hidden width of the gated feed-forward layers: two thirds, up to a multiple of 256."""
    return (int(width * ratio * 2 / 3) + 255) // 256 * 256


@dataclasses.dataclass(frozen=True)
class HartConfig:
    """Shape and precision of a HART transformer.

    sides: side of the square token grid of every scale; the first one, a single token, is drawn at
    the last of `text_tokens` tokens of text. text_width: of their features. vocab, code_width: of
    the codebook. context_norm: the features are normed first. sinusoidal: levels are told apart by
    an MLP of sinusoids, else by a table. residual_width, residual_depth, residual_steps: of the
    head that denoises residuals at the last scale.
    """

    depth: int
    width: int
    heads: int
    sides: tuple[int, ...] = SIDES_1024
    text_tokens: int = 300
    text_width: int = 1536
    vocab: int = 4096
    code_width: int = 32
    mlp_width: int = 0
    context_norm: bool = True
    sinusoidal: bool = True
    residual_width: int = 1024
    residual_depth: int = 6
    residual_steps: int = 8
    dtype: DtypeName = "bfloat16"
    stream: DtypeName = "float32"

    def __post_init__(self):
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", mlp_width(self.width))
        if self.width % self.heads or self.head_dim % 4:
            raise ValueError(
                f"width {self.width} must be heads {self.heads} times a multiple of 4: rotary "
                "positions have two axes"
            )
        if min(self.text_tokens, self.text_width, self.vocab, self.mlp_width, self.depth) < 1:
            raise ValueError(f"HART needs positive sizes, got {self}")
        if (
            self.sides[0] != 1
            or len(set(self.sides)) < 2
            or sorted(set(self.sides)) != list(self.sides)
        ):
            raise ValueError(f"sides must grow from 1, got {self.sides}")
        _ = self.residual, self.precision  # they check their own fields

    @classmethod
    def preset(cls, name: str, **changes) -> HartConfig:
        """A shape by name: `hart_0.7b` as released, `hart_tiny`; `changes` override fields."""
        if name not in PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(PRESETS)}")
        return dataclasses.replace(PRESETS[name], **changes)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def logit_bound(self) -> None:
        """None: queries and keys may have any length."""
        return None

    @property
    def mlp_maps(self) -> int:
        """Activations of `mlp_width` that a feed-forward layer holds at once: gate and values."""
        return 2

    @property
    def precision(self) -> Precision:
        return Precision(self.dtype, self.stream)

    @property
    def residual(self) -> ResidualShape:
        """The shape of the residual head."""
        return ResidualShape(
            self.code_width,
            self.width,
            self.residual_width,
            self.residual_depth,
            self.residual_steps,
        )

    @property
    def schedule(self) -> ScaleSchedule:
        """The text, then the grids from the second one on."""
        grids = tuple((side, side) for side in self.sides[1:])
        return ScaleSchedule.of(grids, prefix=self.text_tokens)

    def grid(self, scale: Scale) -> int:
        """Side of the token grid that a scale draws; the text draws a single token."""
        return self.sides[scale.index]


PRESETS = {
    "hart_0.7b": HartConfig(24, 1536, 24),
    "hart_tiny": HartConfig(
        4, 128, 2, sides=(1, 2, 3, 4), text_tokens=16, text_width=64, vocab=128, code_width=8,
        residual_width=64, residual_depth=2,
    ),
}  # fmt: skip


def progress(index: int, scales: int) -> float:
    """How far a scale has come, 0..1. The last one stands where the one before stands."""
    return min(index, scales - 2) / (scales - 1)


def guidance_ramp(guidance: float, scales: int) -> tuple[float, ...]:
    """Weight of the conditional logits at every scale: `1 + guidance * progress`."""
    return tuple(1 + guidance * progress(scale, scales) for scale in range(scales))


def top_k(index: int) -> int:
    """How many candidates a token has, by its scale: fixed in the released code."""
    return TOP_K if index < LATE_SCALE else LATE_TOP_K


def rotary(config: HartConfig, positions: Int[Array, "R T"], scale: Scale) -> Rotary:
    """(cos, sin) of a scale's tokens, float32 [R, T2, D].

    positions: of the text. A grid begins at the last of them, stretched to the final side.
    """
    half, last = config.head_dim // 2, positions[:, -1:].astype(jnp.float32)
    if not scale.grid:
        angles = positions.astype(jnp.float32)[..., None] * _frequencies(half)
        angles = jnp.concatenate([angles, angles], axis=-1)
    else:
        side = np.float32(scale.height)
        steps = np.arange(scale.height, dtype=np.float32) / side * np.float32(config.sides[-1])
        y, x = np.repeat(steps, scale.width), np.tile(steps, scale.height)
        inverse = _frequencies(half // 2)
        axes = [(jnp.asarray(axis) + last)[..., None] * inverse for axis in (y, x)]
        angles = jnp.concatenate([axes[0], axes[0], axes[1], axes[1]], axis=-1)
    return jnp.cos(angles), jnp.sin(angles)


def _frequencies(count: int) -> Float[Array, "count"]:
    exponents = np.arange(count, dtype=np.float32) / np.float32(count)
    return jnp.asarray(1 / ROTARY_BASE**exponents, jnp.float32)


def turn(x: Float[Array, "R H T D"], table: Rotary) -> Float[Array, "R H T D"]:
    """Heads under their rotary embedding, float32: channel j is mixed with channel j + D/2.

    On a grid the two belong to different axes, so that this is no rotation: as released.
    """
    cos, sin = (part[: len(x), None] for part in table)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return x * cos + jnp.concatenate([-second, first], axis=-1) * sin


class SelfAttention(nnx.Module):
    """Softmax attention at a quarter of the usual scale, over all that is in the cache."""

    def __init__(self, config: HartConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.precision.compute
        self.heads = config.heads
        self.qkv = layers.linear(width, 3 * width, config.precision, rngs, bias=False)
        self.q_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.v_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.proj = layers.linear(width, width, config.precision, rngs)

    def __call__(
        self, x: Float[Array, "R T C"], table: Rotary, attend: Attend
    ) -> Float[Array, "R T C"]:
        mine, heads = attend.heads.columns, self.heads // attend.heads.parts
        q, k, v = jnp.split(attend.heads.gather(self.qkv(x), 3), 3, axis=-1)
        q = turn(layers.split_heads(q + mine(self.q_bias[...]), heads), table)
        k = turn(layers.split_heads(k, heads), table)
        v = layers.split_heads(v + mine(self.v_bias[...]), heads)
        q = q * (ATTENTION_SCALE * q.shape[-1] ** -0.5)

        def write(keys: Array, values: Array, slot: Slot) -> tuple[Array, Array, Array]:
            return q.astype(x.dtype), write_rows(keys, k, slot), write_rows(values, v, slot)

        return self.proj(layers.merge_heads(attend(write).astype(x.dtype)))


class FeedForward(nnx.Module):
    """The gated feed-forward layer of Llama; no biases."""

    def __init__(self, config: HartConfig, rngs: nnx.Rngs):
        width, hidden, precision = config.width, config.mlp_width, config.precision
        self.gate = layers.linear(width, hidden, precision, rngs, bias=False)
        self.up = layers.linear(width, hidden, precision, rngs, bias=False)
        self.down = layers.linear(hidden, width, precision, rngs, bias=False)

    def __call__(self, x: Float[Array, "R T C"]) -> Float[Array, "R T C"]:
        def of_some(x: Float[Array, "R2 T C"]) -> Float[Array, "R2 T C"]:
            return self.down(jax.nn.silu(self.gate(x)) * self.up(x))

        return by_rows(of_some, x)


class Block(nnx.Module):
    """Attention and feed-forward on the residual stream; both norms share one gain."""

    def __init__(self, config: HartConfig, rngs: nnx.Rngs):
        self.norm = layers.Scale(config.width, bias=False, dtype=jnp.float32)
        self.attn = SelfAttention(config, rngs)
        self.ffn = FeedForward(config, rngs)

    def __call__(
        self,
        stream: Stream,
        inputs: tuple[()],
        positions: Rotary,
        attend: Attend,
        config: HartConfig,
    ) -> Stream:
        """The residual stream after this block; text reaches it through the cache alone."""
        del inputs
        x, dtype, gain = stream.settled(), config.precision.compute, self.norm.scale[...]
        y = self.attn(layers.rms_norm(x, gain).astype(dtype), positions, attend)
        x = updated(x, y)
        y = self.ffn(layers.rms_norm(x, gain).astype(dtype))
        return Stream(updated(x, y))
