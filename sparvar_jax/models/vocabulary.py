"""Sampling from a vocabulary: top-k, nucleus filtering, and Gumbel mixtures of codes.

Thresholds are found by searching the ordered bit patterns of float32 numbers, two bits a pass. That
needs no sort, and both `top_k` and `top_p` stay traced.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt32

_BITS = 32
_STEP = 2


def removed(
    logits: Float[Array, "... V"], top_k: Int[Array, ""], top_p: Float[Array, ""]
) -> Bool[Array, "... V"]:
    """Which entries the filters forbid: first all but the `top_k` largest, then the least likely.

    Nucleus filtering removes the entries whose probability, summed from the smallest one up to and
    including their own, is at most `1 - top_p`. The largest entry always stays. `top_k` 0, or
    beyond the vocabulary, and `top_p` 1 (or 0, as released) filter nothing. Entries equal to the
    k-th largest all stay.
    """
    logits = logits.astype(jnp.float32)
    order = _ordered(logits)
    count = jnp.where(top_k == 0, logits.shape[-1], jnp.minimum(top_k, logits.shape[-1]))

    def enough(candidates: UInt32[Array, "... P"]) -> Bool[Array, "... P"]:
        return jnp.sum(order[..., None, :] >= candidates[..., None], -1) >= count

    outside = order < _largest(enough, logits.shape[:-1])[..., None]
    mass = jax.nn.softmax(jnp.where(outside, -jnp.inf, logits), axis=-1)
    spare = jnp.where(top_p == 0, 0.0, 1 - top_p)

    def light(candidates: UInt32[Array, "... P"]) -> Bool[Array, "... P"]:
        below = order[..., None, :] <= candidates[..., None]
        return jnp.sum(jnp.where(below, mass[..., None, :], 0), -1) <= spare

    unlikely = order <= _largest(light, logits.shape[:-1])[..., None]
    return (outside | unlikely) & (order < jnp.max(order, axis=-1, keepdims=True))


def sample(
    logits: Float[Array, "B T V"],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    keys: Key[Array, "B"] | None,
) -> Int[Array, "B T"]:
    """One id per token; each image draws from its own key, without keys the likeliest id."""
    if keys is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = jnp.where(removed(logits, top_k, top_p), -jnp.inf, logits.astype(jnp.float32))
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def mixture(
    logits: Float[Array, "B T V"],
    top_k: Int[Array, ""],
    top_p: Float[Array, ""],
    keys: Key[Array, "B"],
    progress: float,
) -> Float[Array, "B T V"]:
    """Weights of a Gumbel-softmax mixture over the vocabulary: smoother pictures than one id.

    progress: 0 at the first scale to 1 at the last; the mixture sharpens on the way.
    """
    kept = jnp.where(removed(logits, top_k, top_p), -jnp.inf, logits.astype(jnp.float32))
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
    return mixed(kept, noise, progress)


def mixed(
    kept: Float[Array, "B T V"], noise: Float[Array, "B T V"], progress: float
) -> Float[Array, "B T V"]:
    """The weights of `mixture` from filtered logits (-inf where removed) and Gumbel noise."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return jax.nn.softmax((kept * (1 + progress) + noise) / temperature, axis=-1)


def _ordered(x: Float[Array, "..."]) -> UInt32[Array, "..."]:
    """Unsigned integers in the order of the floats: adding zero first makes -0 equal to 0."""
    pattern = jax.lax.bitcast_convert_type(x + 0.0, jnp.uint32)
    negative = pattern >> (_BITS - 1) == 1
    return jnp.where(negative, ~pattern, pattern | jnp.uint32(1 << (_BITS - 1)))


def _largest(
    holds: Callable[[UInt32[Array, "... P"]], Bool[Array, "... P"]], shape: tuple[int, ...]
) -> UInt32[Array, "..."]:
    """The largest integer for which `holds` is true: true up to some point, false beyond it."""
    choices = jnp.arange(1, 1 << _STEP, dtype=jnp.uint32)

    def refine(index: Int[Array, ""], found: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
        shift = (_BITS - _STEP * (index + 1)).astype(jnp.uint32)
        true = holds(found[..., None] + (choices << shift))
        return found + (jnp.sum(true, -1, dtype=jnp.uint32) << shift)

    return jax.lax.fori_loop(0, _BITS // _STEP, refine, jnp.zeros(shape, jnp.uint32))
