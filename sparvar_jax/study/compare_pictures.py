"""All measures of pictures beside others, a value a picture."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sparvar_jax.study import features
from sparvar_jax.study.picture_metrics import ms_ssim, psnr, ssim

SMALLEST_SIDE = 176  # five scales of MS-SSIM need so many pixels

Measured = dict[str, np.ndarray]


def picture_measures(
    weights: features.Parameters | None,
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Measured]:
    """A function of (dense, sparse, where) that returns one value a picture and measure."""

    @jax.jit
    def measure(a, b, where):
        a, b = a.astype(jnp.float32) / 255, b.astype(jnp.float32) / 255
        found = {"psnr": psnr(a, b, where), "ssim": ssim(a, b, where)}
        if min(a.shape[1:3]) >= SMALLEST_SIDE:
            found["ms_ssim"] = ms_ssim(a, b, where)
        if weights is not None:
            found["distance"] = features.distance(weights, a, b, where)
        return found

    def in_pieces(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> Measured:
        pieces = [
            measure(a[i : i + 8], b[i : i + 8], where[i : i + 8]) for i in range(0, len(a), 8)
        ]
        return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}

    return in_pieces
