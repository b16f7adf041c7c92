"""The shape of a VAR transformer, and the parts of its blocks: thin modules, pure calls."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels import Eight
from pallas_kernels.api import Implementation
from sparvar_jax.models import layers
from sparvar_jax.models.infinity_parts import FeedForward
from sparvar_jax.models.layers import DtypeName, Precision
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Attend
from sparvar_jax.plans.rows import Slot
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.stores import Writes, write_rows

SIDES_256 = (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)
SIDES_512 = (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)
HEAD_DIM = 64
PLAIN_SCALE = 0.25  # without l2 norm the released attention uses a quarter of the usual scale

_PRESETS = {  # depth, sides, shared adaptive norm
    "var_d16": (16, SIDES_256, False),
    "var_d20": (20, SIDES_256, False),
    "var_d24": (24, SIDES_256, False),
    "var_d30": (30, SIDES_256, False),
    "var_d36": (36, SIDES_512, True),
}


@dataclasses.dataclass(frozen=True)
class VarConfig:
    """Shape and precision of a VAR transformer.

    sides: side of the square token grid of every scale. classes: conditional classes; the class of
    that number is the unconditional one. vocab, code_width: of the codebook. shared_ada: one
    adaptive-norm projection for all blocks. l2_norm: cosine attention with learned temperatures.
    smooth: sampling mixes codes by a Gumbel softmax instead of drawing one id a token.
    fused: which implementation serves the fused element-wise operations, None for the default.
    """

    depth: int
    width: int
    heads: int
    sides: tuple[int, ...] = SIDES_256
    classes: int = 1000
    vocab: int = 4096
    code_width: int = 32
    mlp_width: int = 0
    shared_ada: bool = False
    l2_norm: bool = True
    smooth: bool = False
    dtype: DtypeName = "bfloat16"
    stream: DtypeName = "float32"
    fused: Implementation | None = None

    def __post_init__(self):
        if not self.mlp_width:
            object.__setattr__(self, "mlp_width", 4 * self.width)
        if self.width % self.heads:
            raise ValueError(f"width {self.width} must be divisible by heads {self.heads}")
        if min(self.classes, self.vocab, self.code_width) < 1:
            raise ValueError(f"a VAR needs classes and a codebook, got {self}")
        if (
            self.sides[0] != 1
            or len(set(self.sides)) < 2
            or sorted(set(self.sides)) != list(self.sides)
        ):
            raise ValueError(f"sides must grow from 1, got {self.sides}")

    @classmethod
    def preset(cls, name: str, **changes) -> VarConfig:
        """A released shape by name, `var_d16` to `var_d36`; `changes` override fields."""
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}: choose one of {', '.join(_PRESETS)}")
        depth, sides, shared = _PRESETS[name]
        config = cls(depth, HEAD_DIM * depth, depth, sides=sides, shared_ada=shared)
        return dataclasses.replace(config, **changes)

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def logit_bound(self) -> float | None:
        """Cosine attention's logits never exceed the clamped temperature, 100."""
        return 100.0 if self.l2_norm else None

    @property
    def precision(self) -> Precision:
        return Precision(self.dtype, self.stream)

    @property
    def schedule(self) -> ScaleSchedule:
        """The square grids this model draws."""
        return ScaleSchedule.of(tuple((side, side) for side in self.sides))

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return sum(side * side for side in self.sides)


def guidance_ramp(guidance: float, scales: int) -> tuple[float, ...]:
    """Weight of the conditional logits at every scale: `1 + guidance * s / (scales - 1)`.

    The unconditional logits weigh one minus that, so guidance starts at none and grows linearly.
    """
    return tuple(1 + guidance * scale / (scales - 1) for scale in range(scales))


class SelfAttention(nnx.Module):
    """Self-attention, with l2 norm by cosine under a learned temperature per head.

    The output lacks `proj`'s bias, which the norm after it adds.
    """

    def __init__(self, config: VarConfig, rngs: nnx.Rngs):
        width, dtype = config.width, config.precision.compute
        self.heads = config.heads
        self.qkv = layers.linear(
            width, 3 * width, config.precision, rngs, bias=False, narrow="int8"
        )
        self.q_bias = nnx.Param(jnp.zeros((width,), dtype))
        self.v_bias = nnx.Param(jnp.zeros((width,), dtype))
        if config.l2_norm:
            self.log_temperature = nnx.Param(jnp.full((config.heads,), jnp.log(4.0), dtype))
        else:
            self.log_temperature = None
        self.proj = layers.linear(width, width, config.precision, rngs, narrow="int8")

    def __call__(self, x: Float[Array, "R T C"] | Eight, attend: Attend) -> Float[Array, "R T C"]:
        mine, heads = attend.heads.columns, self.heads // attend.heads.parts
        qkv = attend.heads.gather(layers.product(self.qkv, x), 3)
        q, k, v = jnp.split(qkv, 3, axis=-1)
        raw = layers.split_heads(q, heads)
        q = layers.split_heads(q + mine(self.q_bias[...]), heads)
        k = layers.split_heads(k, heads)
        v = layers.split_heads(v + mine(self.v_bias[...]), heads)
        if self.log_temperature is None:
            q = q.astype(jnp.float32) * (PLAIN_SCALE * q.shape[-1] ** -0.5)
        else:
            log_temperature = mine(self.log_temperature[...]).astype(jnp.float32)
            temperature = jnp.exp(jnp.minimum(log_temperature, layers.MAX_LOG_TEMPERATURE))
            q, k = layers.unit(q) * temperature[:, None, None], layers.unit(k)

        def write(keys: Array, values: Array, slot: Slot) -> tuple[Array, Array, Array]:
            return q.astype(qkv.dtype), write_rows(keys, k, slot), write_rows(values, v, slot)

        writes = Writes(write, lambda: raw)
        return layers.product(self.proj, layers.merge_heads(attend(writes).astype(qkv.dtype)))


class Block(nnx.Module):
    """Modulated self-attention and feed-forward on the residual stream."""

    def __init__(self, config: VarConfig, rngs: nnx.Rngs):
        width, precision = config.width, config.precision
        self.shared_ada = config.shared_ada
        if config.shared_ada:
            values = 0.02 * jax.random.normal(rngs.params(), (6, width))
            self.ada_gss = nnx.Param(values.astype(precision.compute))
        else:
            self.ada = layers.linear(width, 6 * width, precision, rngs)
        self.attn = SelfAttention(config, rngs)
        self.ffn = FeedForward(width, config.mlp_width, precision, rngs)

    def __call__(
        self,
        stream: Stream,
        inputs: Float[Array, "R2 6 C"],
        positions: tuple[()],
        attend: Attend,
        config: VarConfig,
    ) -> Stream:
        """The residual stream after this block; `inputs` modulate it (their own part is added)."""
        values = inputs
        if self.shared_ada:
            values = values + self.ada_gss[...].astype(jnp.float32)
        fused = config.fused

        def self_attention(stream: Stream, positions: tuple[()]) -> Stream:
            dtype = layers.input_dtype(self.attn.qkv, stream.x.shape[1])
            x, y = stream.normed(values, 2, 4, dtype, fused)
            bias = layers.bias_of(self.attn.proj)
            return Stream(x, self.attn(y, attend), values, bias, index=0)

        def feed_forward(stream: Stream, positions: tuple[()]) -> Stream:
            dtype = layers.input_dtype(self.ffn.fc1, stream.x.shape[1])
            x, y = stream.normed(values, 3, 5, dtype, fused)
            return Stream(x, self.ffn(y), values, layers.bias_of(self.ffn.fc2), index=1)

        for run in (self_attention, feed_forward):
            stream = attend.branch(run.__name__, run, stream, positions)
        return stream
