"""Selection of the heaviest columns by threshold search, and compaction into ascending lists.

Non-negative float32 compare like their bit patterns, so 31 counting passes find the exact value of
the last column kept; a sort would order thousands of values of which only the set matters.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

_BLOCK = 128


def select_top(
    sums: Float[Array, "*n S"],
    count: int,
    granularity: int = 1,
    find: Callable[[Int[Array, "m X"], int], Int[Array, " m"]] | None = None,
) -> Int[Array, "*n count"]:
    """The `count` largest runs in ascending order; ties go to the lowest index.

    `find` searches the thresholds of rows of bit patterns (default: through XLA).
    """
    size = _BLOCK * granularity
    pad = -sums.shape[-1] % size
    runs = jnp.pad(sums.reshape(-1, sums.shape[-1]), ((0, 0), (0, pad)))
    runs = runs.reshape(runs.shape[0], -1, granularity).sum(-1)
    real = np.arange(runs.shape[1]) < -(-sums.shape[-1] // granularity)
    bits = jax.lax.bitcast_convert_type(jnp.maximum(runs, 0.0), jnp.int32)
    bits = jnp.where(real, bits, -1)
    threshold = (find or find_thresholds)(bits, count)[:, None]
    above, equal = bits > threshold, bits == threshold
    above_before, equal_before = prefix_counts(above), prefix_counts(equal)
    room = count - above_before[:, -1:]
    kept = above | (equal & (equal_before <= room))
    rank = above_before + jnp.minimum(equal_before, room) - 1
    return compact(kept, rank, count).reshape(*sums.shape[:-1], count)


def find_thresholds(bits: Int[Array, "m X"], count: int) -> Int[Array, " m"]:
    """Largest int32 that at least `count` entries of the row reach."""

    def narrow(step, low):
        trial = low | (1 << (30 - step))
        enough = (bits >= trial[:, None]).sum(-1) >= count
        return jnp.where(enough, trial, low)

    return jax.lax.fori_loop(0, 31, narrow, jnp.zeros(bits.shape[0], jnp.int32))


def prefix_counts(flags: Bool[Array, "m X"]) -> Int[Array, "m X"]:
    """Inclusive count of true flags, as two triangular products: exact, and far faster than a scan.

    Factors are 0, 1 or at most 128, so that reduced-precision products are exact too.
    """
    blocks = flags.reshape(flags.shape[0], -1, _BLOCK).astype(jnp.float32)
    within = blocks @ np.triu(np.ones((_BLOCK, _BLOCK), np.float32))
    number = blocks.shape[1]
    before = within[..., -1] @ np.triu(np.ones((number, number), np.float32), 1)
    return (within + before[..., None]).reshape(flags.shape).astype(jnp.int32)


def compact(kept: Bool[Array, "m X"], rank: Int[Array, "m X"], count: int) -> Int[Array, "m count"]:
    """Positions of the `count` kept entries of every row."""
    target = jnp.where(kept, rank, count)
    source = jnp.broadcast_to(jnp.arange(kept.shape[1], dtype=jnp.int32), kept.shape)
    row = jnp.arange(kept.shape[0])[:, None]
    out = jnp.zeros((kept.shape[0], count), jnp.int32)
    return out.at[row, target].set(source, mode="drop")
