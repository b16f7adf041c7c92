"""Public fused element-wise operations of a transformer block, with a choice of implementation.

Each reads its inputs once and writes its outputs once. `implementation` names a backend, as in
`api`: "hopper" and "portable" fail with NotImplementedError where they cannot serve; "xla" is the
reference, which leaves the fusion to the compiler; None takes the kernels for 16-bit results where
they can serve.
"""

from __future__ import annotations

import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from pallas_kernels import backends, calls, support
from pallas_kernels.backends import Implementation
from pallas_kernels.fused_shapes import MAX_LOG_TEMPERATURE, Rows, VectorLike, as_vector
from pallas_kernels.quantised import LARGEST, Eight

__all__ = ["cross_attention", "residual_norm", "rotary_to_cache", "text_memory", "text_offsets"]


def residual_norm(
    x: Float[Array, "R T C"],
    branch: Float[Array, "R T C"] | None,
    gain: VectorLike | None,
    scale: VectorLike,
    shift: VectorLike,
    *,
    bias: VectorLike | None = None,
    one_plus: bool = True,
    dtype: DTypeLike = jnp.bfloat16,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "R T C"], Float[Array, "R T C"] | Eight]:
    """`x + gain * (branch + bias)` in x's dtype, and `LN(that) * (1 + scale) + shift` in `dtype`.

    Both are computed in float32; a stream x in bfloat16 is rounded to it once an update, before its
    norm. LN has no affine part, epsilon 1e-6 and a biased variance. `one_plus=False` multiplies by
    `scale` alone: an affine norm. Without `branch` the first result is x itself. Vectors are [C],
    [R, C], or (table [R, K, C], k), which reads row k of a table without slicing it; of more than
    R rows the first are meant. A `dtype` of 8 bits gives the second result as `Eight`, one scale a
    row.
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
    call = calls.ResidualNorm(
        device=support.device_of(x, branch, vectors), x=x, branch=branch, vectors=vectors,
        one_plus=one_plus, dtype=jnp.dtype(dtype),
    )  # fmt: skip
    x, y = backends.serve(call, implementation)
    return x, Eight(*y) if call.dtype in LARGEST else y


def rotary_to_cache(
    qkv: Float[Array, "R T width"],
    q_bias: Float[Array, " C"],
    v_bias: Float[Array, " C"],
    log_temperature: Float[Array, " H"],
    cos: Float[Array, "T D"] | Float[Array, "R T D"],
    sin: Float[Array, "T D"] | Float[Array, "R T D"],
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
    `sin` is negative at even channels; angles [R, T, D] are of every row's own tokens, which the
    Hopper kernel does not take. Queries are multiplied by
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
    if not cos.shape == sin.shape in ((tokens, head_dim), (rows, tokens, head_dim)):
        raise ValueError(
            f"cos and sin must both be {(tokens, head_dim)}, or {(rows, tokens, head_dim)} by row. "
            f"Got {cos.shape} and {sin.shape}."
        )
    place = Rows(start, pitch, width, tokens // width, clear)
    last = start + place.span + clear
    if tokens % width or pitch < width or min(start, clear) < 0 or last > cached:
        raise ValueError(
            f"{tokens} tokens must fill a grid {width} wide whose rows, {pitch} apart from row "
            f"{start} on, and {clear} cleared ones fit the cache's {cached} rows."
        )
    call = calls.RotaryToCache(
        device=support.device_of(qkv, k_cache, v_cache, q_bias, v_bias),
        qkv=qkv.reshape(rows, tokens, 3, heads, head_dim),
        q_bias=q_bias.reshape(heads, head_dim),
        v_bias=v_bias.reshape(heads, head_dim),
        log_temperature=log_temperature,
        cos=cos,
        sin=sin,
        k_cache=k_cache,
        v_cache=v_cache,
        place=place,
        max_log_temperature=max_log_temperature,
    )
    return backends.serve(call, implementation)


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

    A kernel's backend lays them out here as the kernel takes them, so that no call has to.
    """
    offsets = text_offsets(mask, k, q_bias)
    call = calls.TextMemory(device=support.device_of(k, v), k=k, v=v, offsets=offsets)
    return backends.serve(call, implementation)


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
    accumulated in float32. The Hopper kernel pads M to a multiple of 64; what `text_memory` made
    for it is padded already. The text may have more rows than q: the first are meant.
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
    call = calls.CrossAttention(
        device=support.device_of(q, k, v), q=q, k=k, v=v, offsets=offsets, scale=factor
    )
    return backends.serve(call, implementation)
