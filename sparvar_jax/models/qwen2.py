"""Qwen2 language models as text encoders: token ids to the last hidden state.

Covers every text model of model_type `qwen2`, and the language part of a Qwen2-VL: of text alone
its multimodal rotary embedding is the plain one. The residual stream, the norms and the softmax are
float32; matrix products run in `Qwen2Config.dtype`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from sparvar_jax.models.t5 import RmsNorm

ROPE_TYPES = ("default", "mrope")
"""The second is that of Qwen2-VL, which for text alone is the first."""
_HIDDEN = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class Qwen2Config:
    """Shape of a Qwen2 model; `from_hf` reads it from a Hugging Face `config.json`."""

    vocab: int
    width: int
    heads: int
    kv_heads: int
    mlp_width: int
    depth: int
    norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"Qwen2 dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        sizes = (self.vocab, self.width, self.heads, self.kv_heads, self.mlp_width, self.depth)
        if min(sizes) < 1 or self.norm_eps <= 0 or self.rope_theta <= 1:
            raise ValueError(f"Qwen2 sizes must be positive, got {self}")
        if self.width % self.heads or self.head_dim % 2 or self.heads % self.kv_heads:
            raise ValueError(
                "Qwen2 needs a width of heads times an even head dim, and heads that key/value "
                f"heads divide, got {self.width=}, {self.heads=}, {self.kv_heads=}"
            )

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], *, dtype: Literal["float32", "bfloat16"] = "float32"
    ) -> Qwen2Config:
        """Read a Hugging Face `config.json`; optional fields take that library's defaults.

        Raises ValueError for other models, and for attention this encoder does not have.
        """
        kind = config.get("model_type", "qwen2")
        if kind not in ("qwen2", "qwen2_vl"):
            raise ValueError(
                f"expected a config.json of model_type 'qwen2', got {kind!r}: "
                "point at a Qwen2 text model's folder"
            )
        names = {
            "vocab": "vocab_size",
            "width": "hidden_size",
            "heads": "num_attention_heads",
            "mlp_width": "intermediate_size",
            "depth": "num_hidden_layers",
        }
        missing = [name for name in names.values() if name not in config]
        if missing:
            raise ValueError(
                f"the Qwen2 config.json lacks {', '.join(missing)}: "
                "take the file that belongs to the weights"
            )
        rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
        form = rope.get("rope_type", rope.get("type", "default"))
        if form not in ROPE_TYPES:
            raise ValueError(
                f"Qwen2 with rotary positions of type {form!r} is not supported, only plain ones: "
                "take the text encoder HART was released with"
            )
        if config.get("use_sliding_window") or config.get("hidden_act", "silu") != "silu":
            raise ValueError(
                "Qwen2 with a sliding window or another activation than silu is not supported: "
                "take the text encoder HART was released with"
            )
        heads = int(config["num_attention_heads"])
        return cls(
            **{ours: int(config[theirs]) for ours, theirs in names.items()},
            kv_heads=int(config.get("num_key_value_heads") or heads),
            norm_eps=float(config.get("rms_norm_eps", 1e-6)),
            rope_theta=float(config.get("rope_theta", rope.get("rope_theta", 10000.0))),
            dtype=dtype,
        )


class Projection(nnx.Module):
    """Matrix product in the dtype of its kernel, accumulated and given in float32."""

    def __init__(
        self, inputs: int, outputs: int, *, bias: bool, dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        draw = nnx.initializers.normal(inputs**-0.5)
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), dtype))
        self.bias = nnx.Param(jnp.zeros((outputs,), dtype)) if bias else None

    def __call__(self, x: Float[Array, "B T inputs"]) -> Float[Array, "B T outputs"]:
        kernel = self.kernel[...]
        y = _product("btc,cd->btd", x.astype(kernel.dtype), kernel)
        return y if self.bias is None else y + self.bias[...].astype(jnp.float32)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions; softmax in float32."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs) -> None:
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        width, dtype, narrow = (
            config.width,
            jnp.dtype(config.dtype),
            config.kv_heads * self.head_dim,
        )
        self.q = Projection(width, width, bias=True, dtype=dtype, rngs=rngs)
        self.k = Projection(width, narrow, bias=True, dtype=dtype, rngs=rngs)
        self.v = Projection(width, narrow, bias=True, dtype=dtype, rngs=rngs)
        self.o = Projection(width, width, bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T Ct"],
        angles: Float[Array, "T D"],
        visible: Bool[Array, "B T T"],
    ) -> Float[Array, "B T Ct"]:
        batch, tokens, _ = x.shape
        dtype, groups = self.q.kernel[...].dtype, self.heads // self.kv_heads
        q = self.q(x).reshape(batch, tokens, self.heads, self.head_dim)
        k = self.k(x).reshape(batch, tokens, self.kv_heads, self.head_dim)
        v = self.v(x).reshape(batch, tokens, self.kv_heads, self.head_dim).astype(dtype)
        q = (_turn(q, angles) * self.head_dim**-0.5).astype(dtype)
        k = _turn(k, angles).astype(dtype)
        q = q.reshape(batch, tokens, self.kv_heads, groups, self.head_dim)
        scores = _product("bqhgd,bkhd->bhgqk", q, k)
        scores = jnp.where(visible[:, None, None], scores, _HIDDEN)
        mixed = _product("bhgqk,bkhd->bqhgd", jax.nn.softmax(scores, -1).astype(dtype), v)
        return self.o(mixed.reshape(batch, tokens, -1))


def _turn(x: Float[Array, "B T H D"], angles: Float[Array, "T D"]) -> Float[Array, "B T H D"]:
    """Rotary embedding: channel j turns with channel j + D/2."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * jnp.cos(angles)[:, None] + turned * jnp.sin(angles)[:, None]


class Block(nnx.Module):
    """Attention and a gated feed-forward layer on the float32 residual stream."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs) -> None:
        dtype, sizes = jnp.dtype(config.dtype), (config.width, config.mlp_width)
        self.attn_norm = RmsNorm(config.width, config.norm_eps)
        self.attn = Attention(config, rngs=rngs)
        self.mlp_norm = RmsNorm(config.width, config.norm_eps)
        self.gate = Projection(*sizes, bias=False, dtype=dtype, rngs=rngs)
        self.up = Projection(*sizes, bias=False, dtype=dtype, rngs=rngs)
        self.down = Projection(*sizes[::-1], bias=False, dtype=dtype, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T Ct"],
        angles: Float[Array, "T D"],
        visible: Bool[Array, "B T T"],
    ) -> Float[Array, "B T Ct"]:
        x = x + self.attn(self.attn_norm(x), angles, visible)
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y)) * self.up(y))


class Qwen2(nnx.Module):
    """The decoder stack without an output layer; `prefix_features` is what HART takes of it."""

    def __init__(self, config: Qwen2Config, *, rngs: nnx.Rngs) -> None:
        self.config = config
        draw = nnx.initializers.normal(0.02)
        shape, dtype = (config.vocab, config.width), jnp.dtype(config.dtype)
        self.embed = nnx.Param(draw(rngs.params(), shape, dtype))
        self.blocks = nnx.List([Block(config, rngs=rngs) for _ in range(config.depth)])
        self.final_norm = RmsNorm(config.width, config.norm_eps)

    def __call__(
        self, ids: Int[Array, "B T"], visible: Bool[Array, "B T"]
    ) -> Float[Array, "B T Ct"]:
        """Last hidden state in float32; causal, and keys where `visible` is False are not seen.

        Positions count every token, visible or not.
        """
        tokens, half = ids.shape[1], self.config.head_dim // 2
        inverse = 1 / self.config.rope_theta ** (np.arange(half, dtype=np.float32) / half)
        angles = np.outer(np.arange(tokens, dtype=np.float32), inverse.astype(np.float32))
        table = jnp.asarray(np.concatenate([angles, angles], axis=1), jnp.float32)
        seen = jnp.asarray(np.tri(tokens, dtype=bool)) & visible[:, None, :]
        x = self.embed[...][ids].astype(jnp.float32)
        for block in self.blocks:
            x = block(x, table, seen)
        return self.final_norm(x)


def prefix_features(
    model: Qwen2, system: Int[Array, "P"], ids: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B T Ct"]:
    """Features of padded prompts behind a system prompt, float32: of every position of the prompt.

    Padding, where `mask` is False, is not seen by others; its own features are ordinary ones.
    """
    front = jnp.broadcast_to(system, (len(ids), len(system)))
    known = jnp.ones(front.shape, bool)
    hidden = model(jnp.concatenate([front, ids], 1), jnp.concatenate([known, mask], 1))
    return hidden[:, len(system) :]


def _product(formula: str, a: Array, b: Array) -> Array:
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.einsum(formula, a, b, preferred_element_type=jnp.float32, precision=precision)
