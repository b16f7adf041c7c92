"""Cross-attention to a prompt, with the linear maps around it multiplied into a short text.

A head's scores are `(x Wq + b) k`, and what it adds is `w v Wo`. A prompt's keys and values stay
the same for all scales, so `Wq k` and `v Wo` can be made once. With few tokens, H M is far below
the width C, and the two products a token, 2 C^2, shrink to 2 C H M: a quarter at 32 tokens and head
dim 128, which is a tenth of all products of an Infinity block. In exact arithmetic nothing changes.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

import pallas_kernels
from pallas_kernels.api import Implementation
from sparvar_jax.models import layers
from sparvar_jax.models.layers import EightBits, Precision
from sparvar_jax.weights.matrix import dense_of

FOLDED_SHARE = 4
"""Texts are folded where that makes the products so many times smaller. Folded maps are as large as
the text is long (0.5 GiB a row at 32 tokens of Infinity-8B), so longer texts are not."""


class TextMemory(NamedTuple):
    """Keys, values and score offsets of a prompt's tokens."""

    keys: Float[Array, "R H M D"]
    values: Float[Array, "R H M D"]
    offsets: Float[Array, "R H M"]


class FoldedText(NamedTuple):
    """A prompt's tokens with the maps of queries and of the output multiplied in."""

    keys: Float[Array, "R C H M"]
    values: Float[Array, "R H M C"]
    offsets: Float[Array, "R H M"]


Text = TextMemory | FoldedText


class CrossAttention(nnx.Module):
    """Attention of image tokens to a prompt's tokens."""

    def __init__(self, width: int, heads: int, precision: Precision, rngs: nnx.Rngs):
        self.heads = heads
        # Their products are folded into short texts, and then run once a picture.
        kept: EightBits = "int8 weights"
        self.q = layers.linear(width, width, precision, rngs, narrow=kept)
        self.kv = layers.linear(width, 2 * width, precision, rngs, bias=False, narrow=kept)
        self.v_bias = nnx.Param(jnp.zeros((width,), precision.compute))
        self.proj = layers.linear(width, width, precision, rngs, narrow=kept)

    def text(
        self,
        memory: Float[Array, "R M C"],
        mask: Bool[Array, "R M"],
        fused: Implementation | None,
    ) -> Text:
        """What every scale needs of projected text; folded if it is short, in 16-bit precision.

        fused: "xla" keeps the plain form, as an independent reference of the folded one.
        """
        key, value = jnp.split(self.kv(memory), 2, axis=-1)
        key = layers.split_heads(key, self.heads)
        value = layers.split_heads(value + self.v_bias[...], self.heads)
        bias = layers.bias_of(self.q)
        tokens, head_dim = key.shape[2:]
        short = FOLDED_SHARE * tokens <= head_dim
        if fused == "xla" or key.dtype == jnp.float32 or not short:
            plain = pallas_kernels.text_memory(mask, key, value, bias, implementation=fused)
            return TextMemory(*plain)
        query_map = dense_of(self.q.weight, key.dtype).reshape(-1, self.heads, head_dim)
        output_map = dense_of(self.proj.weight, key.dtype).reshape(self.heads, head_dim, -1)
        single = {"preferred_element_type": jnp.float32}
        keys = jnp.einsum("chd,rhmd->rchm", query_map, key, **single) * head_dim**-0.5
        return FoldedText(
            keys.astype(key.dtype),
            _mapped(value, output_map),
            pallas_kernels.text_offsets(mask, key, bias),
        )

    def __call__(
        self, x: Float[Array, "R T C"], text: Text, fused: Implementation | None
    ) -> Float[Array, "R T C"]:
        """The output lacks `proj`'s bias, which the norm after it adds.

        The text may have more rows than x: the first are meant.
        """
        if isinstance(text, FoldedText):
            return _attend_folded(x, FoldedText(*(array[: len(x)] for array in text)))
        # The query's bias is in the offsets.
        query = layers.product(self.q, x)
        out = pallas_kernels.cross_attention(query, *text, implementation=fused)
        return layers.product(self.proj, out)


def _mapped(
    value: Float[Array, "R H M D"], output_map: Float[Array, "H D C"]
) -> Float[Array, "R H M C"]:
    """Every head's values through its part of the output's map.

    Rows and tokens are one axis, so that this is a plain batched product: with the batch axis
    between two free ones, XLA on CPUs takes a loop that sums in the operands' bfloat16.
    """
    rows, heads, tokens, head_dim = value.shape
    joined = value.swapaxes(0, 1).reshape(heads, rows * tokens, head_dim)
    out = jnp.einsum("hnd,hdc->hnc", joined, output_map)
    return out.reshape(heads, rows, tokens, -1).swapaxes(0, 1)


def _attend_folded(x: Float[Array, "R T C"], text: FoldedText) -> Float[Array, "R T C"]:
    """Softmax with scores in float32; weights are rounded to the values' dtype."""
    scores = jnp.einsum("rtc,rchm->rthm", x, text.keys, preferred_element_type=jnp.float32)
    # Else XLA spreads the offsets over all tokens, to let the product add what softmax adds anyway.
    scores = jax.lax.optimization_barrier(scores)
    weights = jax.nn.softmax(scores + text.offsets[:, None], axis=-1)
    return jnp.einsum("rthm,rhmc->rtc", weights.astype(text.values.dtype), text.values)
