"""Inputs and truths of the kernel tests: small named shapes, float64 attention, tolerances."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

# Small stand-ins for the square schedule: rectangles, widths off multiples of 8, ragged lengths.
GRIDS = ((1, 1), (2, 2), (3, 5), (7, 6), (11, 21))
WINDOWS = (-1, -1, 1, 3, 5)
SINKS = 2


def inputs(rows, cache_rows, heads, queries, keys, head_dim, *, valid=None, dtype=jnp.float32,
           clustered=False, seed=0):  # fmt: skip
    """q, k, v as a trained cosine-attention layer has them; rows past `valid` hold NaN.

    clustered: keys and queries share a few directions, so that logits bunch up at both ends.
    """
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((rows, heads, queries, head_dim))
    k = rng.standard_normal((cache_rows, heads, keys, head_dim))
    v = rng.standard_normal((cache_rows, heads, keys, head_dim))
    if clustered:
        centres = rng.standard_normal((4, head_dim))
        q = 0.3 * q + centres[rng.integers(4, size=q.shape[:3])]
        k = 0.3 * k + centres[rng.integers(4, size=k.shape[:3])]
    q = 18.0 * q / np.linalg.norm(q, axis=-1, keepdims=True)
    k = k / np.linalg.norm(k, axis=-1, keepdims=True)
    if valid is not None:
        hidden = ~np.asarray(valid)
        k[:, :, hidden], v[:, :, hidden] = np.nan, np.nan
    return tuple(jnp.asarray(x, dtype) for x in (q, k, v))


def truth(q, k, v, mask):
    """Float64 attention under a mask [#R', #H, T, S], and its lse; empty rows give 0 and -inf.

    Head by head and in place: whole float64 scores of the longest lengths would take gigabytes.
    """
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = k[: q.shape[0]], v[: q.shape[0]]
    mask = np.broadcast_to(mask, (*q.shape[:3], k.shape[2]))
    seen = mask.any((0, 1, 2))
    k, v = np.where(seen[:, None], k, 0), np.where(seen[:, None], v, 0)
    out, lse = np.zeros(q.shape), np.zeros(q.shape[:3])
    for place in np.ndindex(q.shape[:2]):
        scores = q[place] @ k[place].T
        np.copyto(scores, -np.inf, where=~mask[place])
        top = scores.max(-1, keepdims=True)
        scores -= np.where(np.isfinite(top), top, 0)
        weights = np.exp(scores, out=scores)
        total = weights.sum(-1, keepdims=True)
        out[place] = weights @ v[place] / np.maximum(total, 1e-300)
        with np.errstate(divide="ignore"):
            lse[place] = (np.log(total) + top)[:, 0]
    return out, lse


def relative_error(got, want):
    """Frobenius norm of the difference over that of the truth; NaN stays NaN and fails."""
    got = np.asarray(got, np.float64)
    return float(np.linalg.norm(got - want) / max(np.linalg.norm(want), 1e-300))


# Float32 products of 64 to 128 terms and sums over a few thousand keys: a few 1e-7 each.
FLOAT32_TOLERANCE = 5e-6
# Plain bfloat16 attention rounds weights (2^-9) and output (2^-9): about 2.3e-3 in this norm; the
# rule "at most twice the plain error" then gives this bound. float16 keeps 3 more bits.
TOLERANCE = {"float32": FLOAT32_TOLERANCE, "bfloat16": 4.6e-3, "float16": 6e-4}
