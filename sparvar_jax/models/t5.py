"""The T5 encoder: turns token ids into the text features that condition the picture.

Covers T5 v1.1 and Flan-T5 of any size (gated GELU) and the original T5 (ReLU, not gated).
Attention is not scaled, one table of relative position biases is shared by all layers, norms are
RMS norms without bias. The residual stream, the norms and the softmax are float32; matrix products
run in `T5Config.dtype`. The same module with a small config is what a text encoder trained
together with its transformer uses.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Key

from sparvar_jax.models.layers import Linear, Precision
from sparvar_jax.weights import matrix

ACTIVATIONS = ("gated-gelu", "relu")


@dataclass(frozen=True)
class T5Config:
    """Shape of a T5 encoder; `from_hf` reads it from a Hugging Face `config.json`."""

    vocab: int
    width: int
    head_dim: int
    mlp_width: int
    depth: int
    heads: int
    buckets: int = 32
    max_distance: int = 128
    norm_eps: float = 1e-6
    activation: Literal["gated-gelu", "relu"] = "gated-gelu"
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.activation not in ACTIVATIONS:
            raise ValueError(
                f"T5 activation must be one of {ACTIVATIONS}, got {self.activation!r}: "
                "other feed-forward layers were never released with T5 weights"
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"T5 dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        sizes = (self.vocab, self.width, self.head_dim, self.mlp_width, self.depth, self.heads)
        if min(sizes) < 1:
            raise ValueError(f"T5 sizes must be positive, got {self}")
        if self.buckets < 4 or self.buckets % 2 or self.max_distance <= self.buckets // 4:
            raise ValueError(
                "T5 needs an even number of at least 4 relative position buckets and a larger "
                f"maximal distance, got {self.buckets=}, {self.max_distance=}"
            )

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> "T5Config":
        """Read a Hugging Face `config.json`; optional fields take that library's defaults."""
        kind = config.get("model_type", "t5")
        if kind != "t5":
            raise ValueError(
                f"expected a config.json of model_type 't5', got {kind!r}: "
                "point at a T5 or Flan-T5 folder"
            )
        names = {
            "vocab": "vocab_size",
            "width": "d_model",
            "head_dim": "d_kv",
            "mlp_width": "d_ff",
            "depth": "num_layers",
            "heads": "num_heads",
        }
        missing = [name for name in names.values() if name not in config]
        if missing:
            raise ValueError(
                f"the T5 config.json lacks {', '.join(missing)}: "
                "take the file that belongs to the weights"
            )
        return cls(
            **{ours: int(config[theirs]) for ours, theirs in names.items()},
            buckets=int(config.get("relative_attention_num_buckets", 32)),
            max_distance=int(config.get("relative_attention_max_distance", 128)),
            norm_eps=float(config.get("layer_norm_epsilon", 1e-6)),
            activation=config.get("feed_forward_proj", "relu"),
            dtype=dtype,
        )


@lru_cache(maxsize=32)
def relative_buckets(length: int, buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair, int32 `[length, length]`.

    Half the buckets serve each direction; near by they are exact, far away logarithmic.
    """
    half = buckets // 2
    exact = half // 2
    offset = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance = np.abs(offset)
    # float32 on purpose: a distance on the border of two buckets has to fall as in training.
    ratio = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(exact))
    ratio = ratio / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + ratio.astype(np.int32), half - 1)
    return (np.where(distance < exact, distance, far) + half * (offset > 0)).astype(np.int32)


class RmsNorm(nnx.Module):
    """Root-mean-square norm in float32, gain only."""

    def __init__(self, width: int, eps: float) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones((width,), jnp.float32))

    def __call__(self, x: Float[Array, "B T Ct"]) -> Float[Array, "B T Ct"]:
        x = x.astype(jnp.float32)
        return x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + self.eps) * self.scale[...]


class Projection(Linear):
    """Linear map without bias in the model's dtype, accumulated and given in float32.

    Models of 8 bits have its weights so; what it is given stays as it is.
    """

    def __init__(
        self, inputs: int, outputs: int, *, std: float, precision: Precision, rngs: nnx.Rngs
    ) -> None:
        super().__init__(
            inputs,
            outputs,
            bias=False,
            dtype=precision.compute,
            weights=precision.compute,
            precision=precision.matmul,
            narrow="int8 weights",
            draw=partial(_normal, std=std),
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "B T inputs"]) -> Float[Array, "B T outputs"]:
        how = {"dtype": self.dtype, "precision": self.precision}
        return matrix.product(x, self.weight, **how, result=jnp.float32)


class Attention(nnx.Module):
    """Self-attention with an additive bias and no scaling of the scores; softmax in float32."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.heads, self.head_dim = config.heads, config.head_dim
        inner, precision = config.heads * config.head_dim, Precision(config.dtype)
        inputs = config.width**-0.5
        self.q = Projection(
            config.width, inner, std=inputs * config.head_dim**-0.5, precision=precision, rngs=rngs
        )
        self.k = Projection(config.width, inner, std=inputs, precision=precision, rngs=rngs)
        self.v = Projection(config.width, inner, std=inputs, precision=precision, rngs=rngs)
        self.o = Projection(inner, config.width, std=inner**-0.5, precision=precision, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T Ct"], bias: Float[Array, "B H T T"]
    ) -> Float[Array, "B T Ct"]:
        split = (*x.shape[:2], self.heads, self.head_dim)
        dtype = self.q.dtype
        q, k, v = (f(x).astype(dtype).reshape(split) for f in (self.q, self.k, self.v))
        scores = _product("bqhd,bkhd->bhqk", q, k) + bias
        weights = jax.nn.softmax(scores, axis=-1).astype(dtype)
        mixed = _product("bhqk,bkhd->bqhd", weights, v)
        return self.o(mixed.reshape(*x.shape[:2], -1))


class FeedForward(nnx.Module):
    """`wo(gelu(wi_0 x) * wi_1 x)` with the tanh GELU, or `wo(relu(wi x))` for the original T5."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        precision, inputs = Precision(config.dtype), config.width**-0.5
        self.gated = config.activation == "gated-gelu"
        sizes = (config.width, config.mlp_width)
        if self.gated:
            self.wi_0 = Projection(*sizes, std=inputs, precision=precision, rngs=rngs)
            self.wi_1 = Projection(*sizes, std=inputs, precision=precision, rngs=rngs)
        else:
            self.wi = Projection(*sizes, std=inputs, precision=precision, rngs=rngs)
        self.wo = Projection(
            *sizes[::-1], std=config.mlp_width**-0.5, precision=precision, rngs=rngs
        )

    def __call__(self, x: Float[Array, "B T Ct"]) -> Float[Array, "B T Ct"]:
        if self.gated:
            return self.wo(jax.nn.gelu(self.wi_0(x), approximate=True) * self.wi_1(x))
        return self.wo(jax.nn.relu(self.wi(x)))


class Block(nnx.Module):
    """Attention and feed-forward, each behind its norm and added to the float32 residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.attn_norm = RmsNorm(config.width, config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.ffn_norm = RmsNorm(config.width, config.norm_eps)
        self.ffn = FeedForward(config, rngs=rngs)

    def __call__(
        self, x: Float[Array, "B T Ct"], bias: Float[Array, "B H T T"]
    ) -> Float[Array, "B T Ct"]:
        x = x + self.attn(self.attn_norm(x), bias)
        return x + self.ffn(self.ffn_norm(x))


class T5Encoder(nnx.Module):
    """The encoder stack; `encode` is the function that callers want."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embed = nnx.Param(
            _normal(rngs.params(), (config.vocab, config.width), config.dtype, std=1.0)
        )
        self.relative_bias = nnx.Param(
            _normal(
                rngs.params(), (config.buckets, config.heads), jnp.float32, std=config.width**-0.5
            )
        )
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.final_norm = RmsNorm(config.width, config.norm_eps)

    def __call__(
        self, ids: Int[Array, "B T"], visible: Bool[Array, "B T"]
    ) -> Float[Array, "B T Ct"]:
        """Last hidden state in float32; keys where `visible` is False are seen by nobody."""
        buckets = relative_buckets(ids.shape[1], self.config.buckets, self.config.max_distance)
        bias = jnp.moveaxis(self.relative_bias[...][buckets], -1, 0)[None]
        hidden = jnp.float32(jnp.finfo(jnp.float32).min)
        bias = bias + jnp.where(visible[:, None, None, :], jnp.float32(0), hidden)
        x = self.embed[...][ids].astype(jnp.float32)
        for block in self.blocks:
            x = block(x, bias)
        return self.final_norm(x)


def encode(
    encoder: T5Encoder, ids: Int[Array, "B T"], lengths: Int[Array, "B"]
) -> Float[Array, "B T Ct"]:
    """Text features, float32, zero at and after `lengths`; ids found there have no influence."""
    visible = jnp.arange(ids.shape[1])[None, :] < lengths[:, None]
    features = encoder(jnp.where(visible, ids, 0), visible)
    return jnp.where(visible[..., None], features, 0.0)


def _normal(key: Key[Array, ""], shape: tuple[int, ...], dtype: DTypeLike, *, std: float) -> Array:
    return (std * jax.random.normal(key, shape, jnp.float32)).astype(dtype)


def _product(formula: str, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32, precision=precision)
