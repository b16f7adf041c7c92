"""References of the fused operations in plain XLA: what a transformer block writes without them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.fused_shapes import EPSILON, Rows, Vector
from pallas_kernels.xla.quantised import LARGEST, quantise


def residual_norm(
    x: Float[Array, "R T C"],
    branch: Float[Array, "R T C"] | None,
    vectors: dict[str, Vector],
    *,
    one_plus: bool,
    dtype: jnp.dtype,
) -> tuple[Float[Array, "R T C"], Array | tuple[Array, Array]]:
    """Residual update in float32, rounded to the dtype of x; two-pass layer norm of that without
    affine, modulation; in 8 bits values and their scales."""
    stream, x = x.dtype, x.astype(jnp.float32)
    values = {name: table[: len(x), index, None] for name, (table, index) in vectors.items()}
    if branch is not None:
        if "bias" in values:
            branch = branch + values["bias"].astype(branch.dtype)
        x = x + (values["gain"].astype(jnp.float32) * branch if "gain" in values else branch)
        x = rounded(x, stream)
    mean = jnp.mean(x, axis=-1, keepdims=True)
    centred = x - mean
    variance = jnp.mean(jnp.square(centred), axis=-1, keepdims=True)
    normed = centred * jax.lax.rsqrt(variance + EPSILON)
    scale, shift = (values[name].astype(jnp.float32) for name in ("scale", "shift"))
    y = normed * (1 + scale if one_plus else scale) + shift
    x = x.astype(stream)
    return x, quantise(y, dtype, y.shape[-1]) if dtype in LARGEST else y.astype(dtype)


def rounded(x: Float[Array, "..."], dtype: jnp.dtype) -> Float[Array, "..."]:
    """float32 with the values of another dtype; a cast there and back XLA would leave out."""
    if dtype == jnp.float32:
        return x
    kind = jnp.finfo(dtype)
    return jax.lax.reduce_precision(x, kind.nexp, kind.nmant)


def rotary_to_cache(
    qkv: Float[Array, "R T 3 H D"],
    q_bias: Float[Array, "H D"],
    v_bias: Float[Array, "H D"],
    log_temperature: Float[Array, " H"],
    cos: Float[Array, "T D"] | Float[Array, "R T D"],
    sin: Float[Array, "T D"] | Float[Array, "R T D"],
    k_cache: Float[Array, "Rk H S D"],
    v_cache: Float[Array, "Rk H S D"],
    place: Rows,
    max_log_temperature: float,
) -> tuple[Float[Array, "R H T D"], Float[Array, "Rk H S D"], Float[Array, "Rk H S D"]]:
    """Biases in the products' dtype; norms and rotation in float32; one slice update a cache."""
    q, k, v = (part.transpose(0, 2, 1, 3) for part in jnp.moveaxis(qkv, 2, 0))
    q, v = q + q_bias[:, None].astype(q.dtype), v + v_bias[:, None].astype(v.dtype)
    temperature = jnp.minimum(log_temperature.astype(jnp.float32), max_log_temperature)
    q = _rotate(_unit(q) * jnp.exp(temperature)[:, None, None], cos, sin)
    k = _rotate(_unit(k), cos, sin)
    return q.astype(k_cache.dtype), _write(k_cache, k, place), _write(v_cache, v, place)


def cross_attention(
    q: Float[Array, "R T C"],
    k: Float[Array, "Rk H M D"],
    v: Float[Array, "Rk H M D"],
    offsets: Float[Array, "Rk H M"],
    scale: float,
) -> Float[Array, "R T C"]:
    """Softmax attention with scores in float32; weights are rounded to the values' dtype."""
    exact = q.dtype == jnp.float32
    precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
    k, v, offsets = k[: len(q)], v[: len(q)], offsets[: len(q)]
    heads = q.reshape(*q.shape[:2], k.shape[1], k.shape[3])
    scores = jnp.einsum(
        "rthd,rhmd->rhtm", heads, k, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale + offsets[:, :, None]
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("rhtm,rhmd->rthd", weights, v, precision=precision).reshape(q.shape)


def _unit(x: Float[Array, "R H T D"]) -> Float[Array, "R H T D"]:
    x = x.astype(jnp.float32)
    norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
    return x / jnp.maximum(norm, 1e-12)


def _rotate(
    x: Float[Array, "R H T D"], cos: Float[Array, "*R T D"], sin: Float[Array, "*R T D"]
) -> Float[Array, "R H T D"]:
    cos, sin = cos[..., None, :, ::2], sin[..., None, :, 1::2]
    pairs = x.reshape(*x.shape[:-1], x.shape[-1] // 2, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    return jnp.stack([cos * even - sin * odd, sin * even + cos * odd], axis=-1).reshape(x.shape)


def _write(
    cache: Float[Array, "Rk H S D"], new: Float[Array, "R H T D"], place: Rows
) -> Float[Array, "Rk H S D"]:
    rows, heads, _, head_dim = new.shape
    grid = new.astype(cache.dtype).reshape(rows, heads, place.height, place.width, head_dim)
    if place.pitch != place.width:
        grid = jnp.pad(grid, ((0, 0),) * 3 + ((0, place.pitch - place.width), (0, 0)))
    new = grid.reshape(rows, heads, place.span, head_dim)
    if place.clear:
        new = jnp.pad(new, ((0, 0),) * 2 + ((0, place.clear), (0, 0)))
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, place.start, 0))
