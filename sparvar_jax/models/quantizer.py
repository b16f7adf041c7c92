"""Multi-scale binary spherical quantisation: from latents to bits per scale and back.

Everything is NHWC and pure. A *size* is `(height, width)`. Codes have `Cd` channels, the code width
of the tokenizer; a token carries `N` bits: `Cd`, or `4 Cd` where it covers 2x2 latents
(`patchify`). All resizing goes through small explicit matrices, because `jax.image.resize`
antialiases when it shrinks and the released models were trained without.
"""

from functools import lru_cache
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, PRNGKeyArray, Shaped

Size = tuple[int, int]
ResizeMode = Literal["linear", "area", "bicubic"]


def _interpolation_taps(
    source: int, target: int, cubic: bool
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """First tap of every target position and the weight arrays of its consecutive taps."""
    # float32 throughout, as in PyTorch, so that the weights are the same to the last bit or so.
    step = np.float32(source / target)
    position = step * (np.arange(target, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)
    if not cubic:
        position = np.maximum(position, np.float32(0))
    first = np.floor(position).astype(np.int64)
    t = position - first.astype(np.float32)
    if not cubic:
        return first, (1 - t, t)
    a = np.float32(-0.75)

    def near(x: np.ndarray) -> np.ndarray:
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x: np.ndarray) -> np.ndarray:
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return first - 1, (far(t + 1), near(t), near(1 - t), far(2 - t))


@lru_cache(maxsize=512)
def resize_matrix(
    source: int, target: int, mode: ResizeMode = "linear"
) -> Float[np.ndarray, "target source"]:
    """Weights of a 1D resize, `target x source`, float32; rows sum to one.

    `linear` and `bicubic` (a = -0.75) use half-pixel centres (`align_corners=False`), repeat the
    border and never antialias; `area` is adaptive average pooling. The cached array is read-only.
    """
    if source < 1 or target < 1:
        raise ValueError(f"sizes must be positive, got source={source}, target={target}")
    matrix = np.zeros((target, source), np.float32)
    rows = np.arange(target)
    if mode == "area":
        starts = rows * source // target
        stops = -(-(rows + 1) * source // target)
        for row, start, stop in zip(rows, starts, stops, strict=True):
            matrix[row, start:stop] = 1 / (stop - start)
    else:
        first, weights = _interpolation_taps(source, target, cubic=mode == "bicubic")
        for tap, weight in enumerate(weights):
            np.add.at(matrix, (rows, np.clip(first + tap, 0, source - 1)), weight)
    matrix.setflags(write=False)
    return matrix


def resize(
    x: Float[Array, "B height width C"], size: Size, mode: ResizeMode = "linear"
) -> Float[Array, "B target_height target_width C"]:
    """Resize a map to `size` in float32 by one small matrix product per axis; no-op if it fits."""
    if x.shape[1:3] == tuple(size):
        return x
    vertical = resize_matrix(x.shape[1], size[0], mode)
    horizontal = resize_matrix(x.shape[2], size[1], mode)
    exact = jax.lax.Precision.HIGHEST
    x = jnp.einsum("yh,bhwc->bywc", vertical, x.astype(jnp.float32), precision=exact)
    return jnp.einsum("xw,bywc->byxc", horizontal, x, precision=exact)


def pixel_shuffle(x: Shaped[Array, "B height width N"]) -> Shaped[Array, "B height2 width2 Cd"]:
    """Spread each token over 2x2 latents: channel `4c + 2i + j` goes to row i, column j of `c`."""
    batch, height, width, bits = x.shape
    if bits % 4:
        raise ValueError(f"patchified tokens need a multiple of 4 channels, got {bits}")
    x = x.reshape(batch, height, width, bits // 4, 2, 2)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(batch, 2 * height, 2 * width, bits // 4)


def pixel_unshuffle(x: Shaped[Array, "B height2 width2 Cd"]) -> Shaped[Array, "B height width N"]:
    """Gather 2x2 latents into one token; the inverse of `pixel_shuffle`."""
    batch, height, width, channels = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"patchifying needs even height and width, got {height}x{width}")
    x = x.reshape(batch, height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(batch, height // 2, width // 2, 4 * channels)


def latent_size(size: Size, patchify: bool) -> Size:
    """The latent grid under a token grid: twice as fine where a token covers 2x2 latents."""
    return (2 * size[0], 2 * size[1]) if patchify else (size[0], size[1])


def labels_to_codes(
    labels: Shaped[Array, "B height width N"], patchify: bool = False
) -> Float[Array, "B latent_height latent_width Cd"]:
    """Labels 0/1 of a token grid to codes `+-1/sqrt(Cd)` on its latent grid, float32."""
    if patchify:
        labels = pixel_shuffle(labels)
    return (2 * labels.astype(jnp.float32) - 1) / np.float32(np.sqrt(labels.shape[-1]))


def accumulate(
    code_sum: Float[Array, "B height width Cd"] | None,
    codes: Float[Array, "B code_height code_width Cd"],
    size: Size,
) -> Float[Array, "B height width Cd"]:
    """Add one scale's codes, resized to the final latent `size`; `None` starts a sum."""
    codes = resize(codes, size)
    return codes if code_sum is None else code_sum + codes


def next_input(
    code_sum: Float[Array, "B latent_height latent_width Cd"],
    size: Size,
    patchify: bool = False,
    mode: ResizeMode = "linear",
) -> Float[Array, "B height width N"]:
    """The transformer's input for a token grid of `size`.

    `linear` is what sampling and training use; the released tokenizer's own `encode` reports
    `area` instead.
    """
    x = resize(code_sum, latent_size(size, patchify), mode)
    return pixel_unshuffle(x) if patchify else x


def sum_codes(
    labels: tuple[Shaped[Array, "B _ _ N"], ...], size: Size, patchify: bool = False
) -> Float[Array, "B height width Cd"]:
    """The decoder's input from the labels of all scales; `size` is the final latent grid."""
    code_sum = None
    for scale in labels:
        code_sum = accumulate(code_sum, labels_to_codes(scale, patchify), size)
    if code_sum is None:
        raise ValueError("expected the labels of at least one scale, got none")
    return code_sum


class Quantised(NamedTuple):
    """What `quantise` returns; labels and inputs live on token grids.

    labels: per scale int8 `[B, height, width, N]`, the bits of the residual at that scale.
    code_sum: float32 `[B, height, width, Cd]` on the final latent grid, the decoder's input.
    inputs: float32 `[B, height, width, N]` for every scale but the first.
    """

    labels: tuple[Int8[Array, "B _ _ N"], ...]
    code_sum: Float[Array, "B height width Cd"]
    inputs: tuple[Float[Array, "B _ _ N"], ...]


def _flip(
    labels: Int8[Array, "B height width Cd"], key: PRNGKeyArray, strength: float
) -> Int8[Array, "B height width Cd"]:
    """Flip bits with a probability drawn per image, uniform in `[0, strength]`."""
    key_rate, key_bits = jax.random.split(key)
    rate = jax.random.uniform(key_rate, (labels.shape[0], 1, 1, 1), maxval=strength)
    return labels ^ jax.random.bernoulli(key_bits, rate, labels.shape).astype(jnp.int8)


def quantise(
    latent: Float[Array, "B height width Cd"],
    sizes: tuple[Size, ...],
    *,
    patchify: bool = False,
    flip: tuple[PRNGKeyArray, float] | None = None,
    mode: ResizeMode = "linear",
) -> Quantised:
    """Quantise a latent over token grids `sizes`, the last of which must cover it exactly.

    Every scale takes the signs of the area-resized residual and subtracts its codes; the
    residual's magnitude is never used. With `flip=(key, strength)` (bitwise self-correction,
    Infinity, section 3.4) the codes that enter the sum and the inputs have some bits flipped, while
    `labels` stay the right bits for that corrupted history. `mode` resizes `inputs`.
    """
    final = latent_size(sizes[-1], patchify)
    if latent.shape[1:3] != final:
        raise ValueError(
            f"the last of the sizes must cover the latent grid {latent.shape[1:3]}, "
            f"got {final}: take the schedule of the image's size"
        )
    residual = latent.astype(jnp.float32)
    code_sum, labels, inputs = jnp.zeros_like(residual), [], []
    for index, size in enumerate(sizes):
        if index:
            inputs.append(next_input(code_sum, size, patchify, mode))
        # The released code normalises over channels first, which changes no sign.
        bits = (resize(residual, latent_size(size, patchify), "area") > 0).astype(jnp.int8)
        labels.append(pixel_unshuffle(bits) if patchify else bits)
        if flip is not None:
            bits = _flip(bits, jax.random.fold_in(flip[0], index), flip[1])
        codes = resize(labels_to_codes(bits), final)
        residual = residual - codes
        code_sum = code_sum + codes
    return Quantised(tuple(labels), code_sum, tuple(inputs))
