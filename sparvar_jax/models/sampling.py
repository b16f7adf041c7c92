"""From guided logits to tokens: guidance, temperature, top-k, top-p, one key per image."""

from __future__ import annotations

import dataclasses
import operator
import typing
from collections.abc import Sequence
from typing import SupportsIndex

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int8, Key

KEY_KIND = "threefry2x32"
"""How seeds become random bits: named, so that no setting of the process changes a picture."""


@typing.no_type_check  # jax rebuilds it with whatever stands for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Controls:
    """Traced sampling controls: changing them never recompiles.

    guidance, temperature: one value a scale. top_p: kept probability mass, 1 keeps everything.
    top_k: kept candidates, 0 keeps everything (inert where a token has two labels a bit).
    """

    guidance: Float[Array, "scales"]
    temperature: Float[Array, "scales"]
    top_p: Float[Array, ""]
    top_k: jax.Array


def image_keys(seed: SupportsIndex, batch: int) -> Key[Array, "B"]:
    """One key per image: image b of a call with seed s draws what seed s + b draws alone."""
    first = operator.index(seed)  # numpy's integers would overflow
    return keys_of([first + image for image in range(batch)])


def keys_of(seeds: Sequence[int]) -> Key[Array, "B"]:
    """The key of every seed below 2^32: what `jax.random.key` makes where nothing shifts seeds."""
    data = jnp.asarray(np.array([[0, seed] for seed in seeds], np.uint32))
    return jax.random.wrap_key_data(data, impl=KEY_KIND)


def mix(x: Float[Array, "R ..."], guidance: Float[Array, ""]) -> Float[Array, "B ..."]:
    """Classifier-free guidance: `g * conditional + (1 - g) * unconditional`, halves of the rows."""
    conditional, unconditional = jnp.split(x, 2)
    return guidance * conditional + (1 - guidance) * unconditional


def bits_removed(pairs: Float[Array, "... 2"], top_p: Float[Array, ""]) -> Bool[Array, "... 2"]:
    """Labels that nucleus filtering forbids: those whose probability is at most 1 - top_p.

    Of two labels the likelier always stays.
    """
    probability = jax.nn.softmax(pairs.astype(jnp.float32), axis=-1)
    likelier = pairs >= pairs[..., ::-1]
    return (probability <= 1 - top_p) & ~likelier


def sample_bits(
    pairs: Float[Array, "B T N 2"], top_p: Float[Array, ""], keys: Key[Array, "B"] | None
) -> Int8[Array, "B T N"]:
    """One label per bit; each image draws from its own key, without keys the likelier label.

    A tie without keys gives label 0.
    """
    if keys is None:
        return (pairs[..., 1] > pairs[..., 0]).astype(jnp.int8)
    removed = bits_removed(pairs, top_p)
    probability = jax.nn.sigmoid((pairs[..., 1] - pairs[..., 0]).astype(jnp.float32))
    probability = jnp.where(removed[..., 1], 0.0, jnp.where(removed[..., 0], 1.0, probability))
    draw = jax.vmap(lambda key: jax.random.uniform(key, pairs.shape[1:-1], jnp.float32))(keys)
    return (draw < probability).astype(jnp.int8)
