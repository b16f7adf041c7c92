"""Parts shared by the transformers: linear maps, norms, heads, masked attention."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from pallas_kernels import Eight
from pallas_kernels.api import Implementation
from pallas_kernels.quantised import BLOCK
from sparvar_jax.weights import matrix
from sparvar_jax.weights.matrix import Dense, Narrow, Scaled, Weight

DtypeName = Literal["bfloat16", "float32"]
EightBits = Literal["int8", "float8_e4m3fn", "int8 weights"]
"""What a matrix becomes in a model of 8 bits: operands of 8-bit products, or 8-bit values that meet
activations as they are."""
MAX_LOG_TEMPERATURE = 4.605170185988092  # ln 100, the clamp of cosine attention's temperature
NORM_EPSILON = 1e-6
_SMALL = nnx.initializers.truncated_normal(0.02)


@dataclasses.dataclass(frozen=True)
class Precision:
    """How a model computes: `weights` and `compute` dtypes, and the matmul precision they imply.

    float32 asks for exact products (no tf32), which parity needs. stream: of the residual stream
    between blocks; updates and norms are computed in float32 whatever it is.
    """

    dtype: DtypeName = "bfloat16"
    stream: DtypeName = "float32"

    def __post_init__(self):
        for name in ("dtype", "stream"):
            found = getattr(self, name)
            if found not in ("bfloat16", "float32"):
                raise ValueError(f"{name} must be 'bfloat16' or 'float32', got {found!r}")

    @property
    def compute(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)

    @property
    def matmul(self) -> jax.lax.Precision:
        exact = self.dtype == "float32"
        return jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT


class Linear(nnx.Module):
    """A linear map whose matrix [inputs, outputs] is dense, or 8-bit values with scales.

    dtype: of products and results. weights: of the parameters. narrow: what the matrix becomes when
    its model is made one of 8 bits, None for one that stays as it is. implementation: of 8-bit
    products, None for the best one. draw: what the matrix begins as.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        *,
        bias: bool,
        dtype: DTypeLike,
        weights: DTypeLike,
        precision: jax.lax.Precision,
        narrow: EightBits | None = None,
        draw: nnx.Initializer = _SMALL,
        rngs: nnx.Rngs,
    ):
        self.kernel = nnx.Param(draw(rngs.params(), (inputs, outputs), weights))
        self.kernel_scale: nnx.Param | None = nnx.data(None)
        self.bias: nnx.Param | None = nnx.data(None)
        if bias:
            self.bias = nnx.Param(jnp.zeros((outputs,), weights))
        self.dtype, self.precision = jnp.dtype(dtype), precision
        self.narrow: EightBits | None = narrow
        self.is_narrow = False
        self.implementation: Implementation | None = None

    @property
    def weight(self) -> Weight:
        """The matrix as a value."""
        if self.kernel_scale is None:
            return Dense(self.kernel[...])
        kind = Narrow if self.is_narrow else Scaled
        return kind(self.kernel[...], self.kernel_scale[...])

    def __call__(self, x: Float[Array, "... I"] | Eight) -> Float[Array, "... O"]:
        y = product(self, x)
        if self.bias is None:
            return y
        return y + self.bias[...].astype(self.dtype).reshape((1,) * (y.ndim - 1) + (-1,))


def linear(
    inputs: int,
    outputs: int,
    precision: Precision,
    rngs: nnx.Rngs,
    *,
    bias: bool = True,
    weights: DTypeLike | None = None,
    compute: DTypeLike | None = None,
    narrow: EightBits | None = None,
) -> Linear:
    """A linear map with kernel [inputs, outputs]; weights and products in the model's dtype.

    weights, compute: override the dtypes where the released runs keep a float32 island.
    narrow: as in `Linear`.
    """
    return Linear(
        inputs,
        outputs,
        bias=bias,
        dtype=compute or precision.compute,
        weights=weights or precision.compute,
        precision=precision.matmul,
        narrow=narrow,
        rngs=rngs,
    )


def product(linear: Linear, x: Float[Array, "... I"] | Eight) -> Float[Array, "... O"]:
    """A linear map without its bias, for a fused operation that adds it."""
    weight, dtype, implementation = linear.weight, linear.dtype, linear.implementation
    if isinstance(x, Eight) or matrix.takes_eight_bits(x, weight):
        y: Any = matrix.eight_bit_product(x, weight, dtype=dtype, implementation=implementation)
        return y
    if isinstance(weight, Narrow) and x.ndim == 3:
        return matrix.product_of_few(x, weight, dtype=dtype, implementation=implementation)
    return matrix.product(x, weight, dtype=dtype, precision=linear.precision)


def input_dtype(linear: Linear, tokens: int) -> jnp.dtype:
    """The dtype in which a linear map takes so many tokens best: 8 bits, or its own."""
    narrow = linear.is_narrow and tokens >= matrix.FEWEST_TOKENS
    return jnp.dtype(linear.narrow if narrow else linear.dtype)


def gelu_product(
    linear: Linear, x: Float[Array, "R T I"] | Eight, *, into: Linear
) -> Float[Array, "R T O"] | Eight:
    """A linear map and the tanh GELU; in 8 bits where the map after it, `into`, takes them."""
    weight, after = linear.weight, into.weight
    if not isinstance(x, Eight) and not matrix.takes_eight_bits(x, weight):
        if isinstance(weight, Narrow) and x.ndim == 3:
            return matrix.product_of_few(
                x,
                weight,
                bias=bias_of(linear),
                gelu=True,
                dtype=linear.dtype,
                implementation=linear.implementation,
            )
        return jax.nn.gelu(linear(x), approximate=True)
    divides = linear.kernel[...].shape[0] % BLOCK == 0
    dtype = after.values.dtype if isinstance(after, Narrow) and divides else linear.dtype
    return matrix.eight_bit_product(
        x,
        weight,
        bias=bias_of(linear),
        gelu=True,
        dtype=dtype,
        implementation=linear.implementation,
    )


def bias_of(linear: Linear) -> Float[Array, "O"]:
    """The bias that `product` leaves out."""
    assert linear.bias is not None
    return linear.bias[...]


class Scale(nnx.Module):
    """The gain (and shift) of a norm."""

    def __init__(self, width: int, *, bias: bool, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.bias = nnx.Param(jnp.zeros((width,), dtype)) if bias else None


def layer_norm(x: Float[Array, "... C"]) -> Float[Array, "... C"]:
    """Layer norm without affine, in float32, biased variance, epsilon 1e-6."""
    x = x.astype(jnp.float32)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(variance + NORM_EPSILON)


def rms_norm(x: Float[Array, "... C"], scale: Float[Array, "C"]) -> Float[Array, "... C"]:
    """Root-mean-square norm with a gain, in float32, epsilon 1e-6."""
    x = x.astype(jnp.float32)
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + NORM_EPSILON) * scale.astype(jnp.float32)


def modulate(
    x: Float[Array, "R T C"], scale: Float[Array, "R C"], shift: Float[Array, "R C"]
) -> Float[Array, "R T C"]:
    """Adaptive layer norm: `LN(x) * (1 + scale) + shift`, float32."""
    return layer_norm(x) * (1 + scale[:, None]) + shift[:, None]


def unit(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Vectors divided by their Euclidean norm (at least 1e-12), float32."""
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(norm, 1e-12)


def split_heads(x: Float[Array, "R T C"], heads: int) -> Float[Array, "R H T D"]:
    """Width split into heads, heads-major."""
    rows, tokens, width = x.shape
    return x.reshape(rows, tokens, heads, width // heads).transpose(0, 2, 1, 3)


def merge_heads(x: Float[Array, "R H T D"]) -> Float[Array, "R T C"]:
    """The inverse of `split_heads`."""
    rows, heads, tokens, head_dim = x.shape
    return x.transpose(0, 2, 1, 3).reshape(rows, tokens, heads * head_dim)


def masked_attention(
    q: Float[Array, "R H T D"],
    k: Float[Array, "R H M D"],
    v: Float[Array, "R H M D"],
    mask: Bool[Array, "R M"],
    precision: Precision,
) -> Float[Array, "R H T D"]:
    """Softmax attention over the few tokens of a text, scale 1/sqrt(D), scores in float32."""
    scores = jnp.einsum(
        "rhtd,rhmd->rhtm",
        q,
        k,
        precision=precision.matmul,
        preferred_element_type=jnp.float32,
    )
    scores = scores * (q.shape[-1] ** -0.5)
    scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rhtm,rhmd->rhtd", weights, v, precision=precision.matmul)


def length_mask(lengths: Int[Array, "R"], size: int) -> Bool[Array, "R size"]:
    """True at the first `lengths[r]` of `size` positions."""
    return jnp.arange(size)[None, :] < lengths[:, None]
