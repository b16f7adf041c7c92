"""Small schedules, random caches and an independent float32 attention for policy tests."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.plans.schedule import ASPECT_TABLES, ScaleSchedule, infinity_schedule
from sparvar_jax.plans.strategy import Place, View

SMALL = ScaleSchedule.of(((1, 1), (2, 2), (3, 3), (5, 4), (8, 6), (10, 8), (13, 11)))
VAR_256 = ScaleSchedule.of(tuple((s, s) for s in (1, 2, 3, 4, 5, 6, 8, 10, 13, 16)))
VAR_512 = ScaleSchedule.of(tuple((s, s) for s in (1, 2, 3, 4, 6, 9, 13, 18, 24, 32)))
EVERY_INFINITY = {
    f"{ratio}-{size}": infinity_schedule(ratio, size)
    for ratio, size in itertools.product(ASPECT_TABLES, ("0.25M", "0.60M", "1M"))
}
EVERY_RATIO = {name: value for name, value in EVERY_INFINITY.items() if name.endswith("0.25M")}
"""One size of each of the 15 aspect ratios: enough where a test builds whole masks."""
VAR = {"VAR-256": VAR_256, "VAR-512": VAR_512}


def cache(place: Place, rows: int = 1, heads: int = 2, depth: int = 16, seed: int = 0):
    """(q, k, v) for a scale; k and v in the place's cache layout, zeros where no token lives."""
    draw = np.random.default_rng(seed)
    layout, scale = place.rows, place.scale
    q = draw.normal(size=(rows, heads, scale.tokens, depth)).astype(np.float32)
    tokens = draw.normal(size=(2, rows, heads, place.schedule.tokens, depth)).astype(np.float32)
    filled = np.zeros((2, rows, heads, layout.total, depth), np.float32)
    where = layout.physical(place.index)
    filled[:, :, :, where] = tokens[:, :, :, : len(where)]
    return jnp.asarray(q), jnp.asarray(filled[0]), jnp.asarray(filled[1])


def attend(strategy, q, k, v, place: Place, state):
    """(output, state entries left) of an attention over a plain cache, as part of a program."""

    def attention(q, k, v, state):
        output = strategy(View(k, v), q, place, state)
        return output.out, dict(output.state)

    return jax.jit(attention)(q, k, v, state)


def oracle(q, k, v, mask) -> np.ndarray:
    """Masked softmax attention in float64; k and v packed, mask [..., T, S]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    length = mask.shape[-1]
    scores = q @ k[:, :, :length].swapaxes(-1, -2)
    weights = np.where(mask, np.exp(scores - scores.max(-1, keepdims=True)), 0)
    return weights / weights.sum(-1, keepdims=True) @ v[:, :, :length]
