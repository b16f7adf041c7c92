"""PSNR, SSIM and MS-SSIM of batches of pictures, in JAX, over a weighted part of each picture.

Pictures are floats in [0, 1]. Weights [B, height, width] say where a picture counts: ones for all
of it, a box of ones for an object. SSIM follows Wang et al.: Gaussian window of 11 pixels with
sigma 1.5, population covariance, colour channels averaged.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SCALE_WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
MAX_PSNR = 99.0
_C1, _C2 = 0.01**2, 0.03**2

Either = Array | np.ndarray
Pictures = Float[Either, "B height width 3"]
Weights = Float[Either, "B height width"]


def window(size: int = 11, sigma: float = 1.5) -> Float[np.ndarray, "size"]:
    """A normalised Gaussian."""
    offsets = np.arange(size) - size // 2
    values = np.exp(-(offsets**2) / (2 * sigma**2))
    return (values / values.sum()).astype(np.float32)


def psnr(a: Pictures, b: Pictures, weights: Weights) -> Float[Array, "B"]:
    """Decibels of the mean squared error over the weighted part, at most `MAX_PSNR`."""
    error = _mean(((a - b) ** 2).mean(-1), weights)
    return jnp.minimum(-10 * jnp.log10(jnp.maximum(error, 1e-12)), MAX_PSNR)


def ssim(a: Pictures, b: Pictures, weights: Weights) -> Float[Array, "B"]:
    """Mean structural similarity over the windows centred in the weighted part."""
    similarity, _ = _maps(a, b)
    return _mean(similarity, _inner(weights))


def ms_ssim(a: Pictures, b: Pictures, weights: Weights) -> Float[Array, "B"]:
    """Multi-scale SSIM over five scales; pictures need at least 176 pixels a side."""
    result = jnp.ones(a.shape[0])
    for level, power in enumerate(SCALE_WEIGHTS):
        if level:
            a, b, weights = _halve(a), _halve(b), _halve(weights[..., None])[..., 0]
        similarity, contrast = _maps(a, b)
        last = level + 1 == len(SCALE_WEIGHTS)
        value = _mean(similarity if last else contrast, _inner(weights))
        result = result * jnp.maximum(value, 0) ** power
    return result


def object_box(
    picture: Float[np.ndarray, "height width 3"], margin: int = 4
) -> tuple[slice, slice]:
    """The box around everything unlike the border's median colour, a few pixels wider.

    Fits single objects on plain ground; the whole picture where nothing stands out.
    """
    border = np.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    unlike = np.abs(picture - np.median(border, 0)).max(-1) > 0.1
    if not unlike.any():
        return slice(0, picture.shape[0]), slice(0, picture.shape[1])
    spans = []
    for axis, size in ((1, picture.shape[0]), (0, picture.shape[1])):
        hit = np.flatnonzero(unlike.any(axis))
        spans.append(slice(max(int(hit[0]) - margin, 0), min(int(hit[-1]) + margin + 1, size)))
    return spans[0], spans[1]


def _mean(values: Float[Either, "B h w"], weights: Weights) -> Float[Array, "B"]:
    return jnp.sum(values * weights, (1, 2)) / jnp.maximum(jnp.sum(weights, (1, 2)), 1e-6)


def _inner(weights: Weights) -> Float[Either, "B h w"]:
    return weights[:, 5:-5, 5:-5]


def _halve(x: Float[Either, "B h w C"]) -> Float[Either, "B h2 w2 C"]:
    """Mean of 2x2 pixels; an odd last row or column is left out."""
    height, width = x.shape[1] // 2 * 2, x.shape[2] // 2 * 2
    x = x[:, :height, :width]
    return x.reshape(x.shape[0], height // 2, 2, width // 2, 2, -1).mean((2, 4))


def _blur(x: Float[Either, "B h w C"]) -> Float[Either, "B h2 w2 C"]:
    for axis in (1, 2):
        taps = [
            weight * jax.lax.slice_in_dim(x, i, x.shape[axis] - 10 + i, axis=axis)
            for i, weight in enumerate(window())
        ]
        x = jnp.sum(jnp.stack(taps), 0)
    return x


def _maps(a: Pictures, b: Pictures) -> tuple[Float[Either, "B h w"], Float[Either, "B h w"]]:
    """(SSIM, contrast-structure) of every whole window, colour channels averaged."""
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    contrast = (2 * covariance + _C2) / (var_a + var_b + _C2)
    luminance = (2 * mean_a * mean_b + _C1) / (mean_a**2 + mean_b**2 + _C1)
    return (luminance * contrast).mean(-1), contrast.mean(-1)
