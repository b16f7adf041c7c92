"""Public fused element-wise operations of a transformer block, with a choice of implementation.

Each reads its inputs once and writes its outputs once. `implementation`: "mosaic" (Hopper kernels)
fails with NotImplementedError where it cannot serve; "xla" is the reference, which leaves the
fusion to the compiler; None takes the kernels for 16-bit results where they can serve.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from pallas_kernels import fused_xla, support
from pallas_kernels.api import Implementation, choose
from pallas_kernels.fused_shapes import MAX_LOG_TEMPERATURE, Rows, VectorLike, as_vector

__all__ = ["cross_attention", "residual_norm", "rotary_to_cache", "text_memory", "text_offsets"]

_HALVES = (jnp.bfloat16, jnp.float16)


def _chosen(requested: Implementation | None, reason: str) -> Implementation:
    return choose(requested, support.device_reason() or reason)


def residual_norm(
    x: Float[Array, "R T C"],
    branch: Float[Array, "R T C"] | None,
    gain: VectorLike | None,
    scale: VectorLike,
    shift: VectorLike,
    *,
    bias: VectorLike | None = None,
    one_plus: bool = True,
    dtype: jnp.dtype = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "R T C"], Float[Array, "R T C"]]:
    """`x + gain * (branch + bias)` in float32, and `LN(that) * (1 + scale) + shift` in `dtype`.

    LN has no affine part, epsilon 1e-6 and a biased variance. `one_plus=False` multiplies by
    `scale` alone: an affine norm. Without `branch` the first result is x itself. Vectors are [C],
    [R, C], or (table [R, K, C], k), which reads row k of a table without slicing it; of more than
    R rows the first are meant.
    """
    rows, _, width = x.shape
    if branch is None and (gain is not None or bias is not None):
        raise ValueError("gain and bias belong to a branch; got one of them without a branch.")
    if branch is not None and branch.shape != x.shape:
        raise ValueError(f"branch must have x's shape {x.shape}. Got {branch.shape}.")
    given = {"gain": gain, "bias": bias, "scale": scale, "shift": shift}
    vectors = {
        name: as_vector(name, value, rows, width)
        for name, value in given.items()
        if value is not None
    }
    reason = ""
    if x.dtype != jnp.float32:
        reason = f"the fused norm takes a float32 residual stream; got {x.dtype}"
    elif width % 128 or width > 4096:
        reason = f"the fused norm takes widths up to 4096 in steps of 128; got {width}"
    elif implementation is None and dtype not in _HALVES:
        reason = "float32 results are left to the compiler, which rounds as everywhere else"
    if _chosen(implementation, reason) == "xla":
        return fused_xla.residual_norm(x, branch, vectors, one_plus=one_plus, dtype=dtype)
    from pallas_kernels import fused_norm

    config = fused_norm.norm_config(width)
    return fused_norm.residual_norm(
        x, branch, vectors, one_plus=one_plus, dtype=dtype, config=config
    )


def rotary_to_cache(
    qkv: Float[Array, "R T width"],
    q_bias: Float[Array, " C"],
    v_bias: Float[Array, " C"],
    log_temperature: Float[Array, " H"],
    cos: Float[Array, "T D"],
    sin: Float[Array, "T D"],
    k_cache: Float[Array, "Rk H S D"],
    v_cache: Float[Array, "Rk H S D"],
    *,
    start: int,
    width: int,
    pitch: int,
    clear: int = 0,
    max_log_temperature: float = MAX_LOG_TEMPERATURE,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "R H T D"], Float[Array, "Rk H S D"], Float[Array, "Rk H S D"]]:
    """From the joint product [R, T, 3C] (no bias) to queries [R, H, T, D] and updated caches.

    Queries and keys are unit vectors per head, turned by the token's angles in adjacent pairs;
    `sin` is negative at even channels. Queries are multiplied by
    `exp(min(log_temperature, max_log_temperature))`. The scale's tokens form a grid `width` wide;
    grid row y, column x goes to cache row `start + y * pitch + x` of the first R rows; rows between
    `width` and `pitch`, and `clear` rows after the grid, are zeroed. Donate the caches: they are
    then updated in place.
    """
    heads, cached, head_dim = k_cache.shape[1:]
    rows, tokens = qkv.shape[:2]
    if qkv.shape[2] != 3 * heads * head_dim or rows > k_cache.shape[0]:
        raise ValueError(
            f"qkv must be [R, T, {3 * heads * head_dim}] with R at most {k_cache.shape[0]}, as the "
            f"cache {k_cache.shape} asks. Got {qkv.shape}."
        )
    place = Rows(start, pitch, width, tokens // width, clear)
    last = start + place.span + clear
    if tokens % width or pitch < width or min(start, clear) < 0 or last > cached:
        raise ValueError(
            f"{tokens} tokens must fill a grid {width} wide whose rows, {pitch} apart from row "
            f"{start} on, and {clear} cleared ones fit the cache's {cached} rows."
        )
    reason = ""
    if qkv.dtype not in _HALVES or not qkv.dtype == k_cache.dtype == v_cache.dtype:
        reason = f"the fused rotary takes one 16-bit dtype; got {qkv.dtype} and {k_cache.dtype}"
    elif head_dim not in (64, 128) or heads * head_dim % 128:
        reason = f"the fused rotary takes head dims 64 and 128; got {heads} heads of {head_dim}"
    operands = (
        qkv.reshape(rows, tokens, 3, heads, head_dim),
        q_bias.reshape(heads, head_dim),
        v_bias.reshape(heads, head_dim),
        log_temperature,
        cos,
        sin,
        k_cache,
        v_cache,
        place,
        max_log_temperature,
    )
    if _chosen(implementation, reason) == "xla":
        return fused_xla.rotary_to_cache(*operands)
    from pallas_kernels import fused_rotary

    return fused_rotary.rotary_to_cache(*operands, fused_rotary.RotaryConfig())


def text_offsets(
    mask: Bool[Array, "R M"],
    k: Float[Array, "R H M D"],
    q_bias: Float[Array, " C"] | None = None,
    *,
    scale: float | None = None,
) -> Float[Array, "R H M"]:
    """What `cross_attention` adds to every score of a key: made once, used at every scale.

    The lowest float32 where the text is padding, else the query bias's share of the score,
    `scale * q_bias k` (scale defaults to 1 / sqrt(D)).
    """
    rows, heads, keys, head_dim = k.shape
    offsets = jnp.zeros((rows, heads, keys), jnp.float32)
    if q_bias is not None:
        bias = q_bias.reshape(heads, head_dim).astype(jnp.float32)
        products = k.astype(jnp.float32) * bias[:, None]
        offsets = products.sum(-1) * (head_dim**-0.5 if scale is None else scale)
    return jnp.where(mask[:, None], offsets, jnp.finfo(jnp.float32).min)


def text_memory(
    mask: Bool[Array, "R M"],
    k: Float[Array, "R H M D"],
    v: Float[Array, "R H M D"],
    q_bias: Float[Array, " C"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "R H M2 D"], Float[Array, "R H M2 D"], Float[Array, "R H M2"]]:
    """Keys, values and offsets for `cross_attention`, once for all scales.

    For the kernel they are padded here to the length it takes, so that no call has to.
    """
    offsets = text_offsets(mask, k, q_bias)
    if _chosen(implementation, _cross_reason(k.dtype, k, v)) == "xla":
        return k, v, offsets
    from pallas_kernels import fused_cross

    return fused_cross.pad_text(k, v, offsets)


def _cross_reason(dtype: jnp.dtype, k: Array, v: Array) -> str:
    """Why the kernel cannot attend to a text of these keys and values."""
    keys, head_dim = k.shape[2:]
    if dtype not in _HALVES or not dtype == k.dtype == v.dtype:
        return f"fused cross attention takes one 16-bit dtype; got {dtype} and {k.dtype}"
    if head_dim not in (64, 128) or keys > 128:
        return (
            "fused cross attention takes up to 128 keys and head dims 64 and 128; got "
            f"{keys} keys of {head_dim}"
        )
    return ""


def cross_attention(
    q: Float[Array, "R T C"],
    k: Float[Array, "Rk H M D"],
    v: Float[Array, "Rk H M D"],
    offsets: Float[Array, "Rk H M"],
    *,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "R T C"]:
    """Attention of every token to a prompt's M tokens, token-major in and out.

    Softmax over M of `scale * q k + offsets` (see `text_offsets`; scale defaults to 1 / sqrt(D)),
    accumulated in float32. The kernel pads M to a multiple of 64; what `text_memory` made for it
    is padded already. The text may have more rows than q: the first are meant.
    """
    rows, heads, _, head_dim = k.shape
    if q.shape[0] > rows or q.shape[2] != heads * head_dim or v.shape != k.shape:
        raise ValueError(
            f"q must be [R, T, {heads * head_dim}], R at most {rows}, and v {k.shape}, as k asks. "
            f"Got {q.shape} and {v.shape}."
        )
    if offsets.shape != k.shape[:3]:
        raise ValueError(f"offsets must be {k.shape[:3]}. Got {offsets.shape}.")
    factor = float(head_dim) ** -0.5 if scale is None else scale
    if _chosen(implementation, _cross_reason(q.dtype, k, v)) == "xla":
        return fused_xla.cross_attention(q, k, v, offsets, factor)
    from pallas_kernels import fused_cross

    return fused_cross.cross_attention(q, k, v, offsets, factor, fused_cross.CrossConfig())
