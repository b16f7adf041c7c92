"""The VQVAE side by side: latent, token ids of every scale, code sums, the picture from them."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sparvar_convert.side_by_side import Options, Row, Sides, fill_twin, row, with_bits
from sparvar_convert.torch_twin.vqvae import VqvaeTwin
from sparvar_jax.models import quantizer
from sparvar_jax.models.var_parts import SIDES_256
from sparvar_jax.models.vqvae import Vqvae

_SMOOTHING = 8


def compare(sides: Sides, options: Options) -> tuple[Row, ...]:
    """A made-up picture through both: encoder, quantiser (on the twin's latent), decoder."""
    side = SIDES_256[-1] * sides.config.stride
    draw = np.random.default_rng(options.seed)
    coarse = draw.uniform(-1, 1, (1, side // _SMOOTHING, side // _SMOOTHING, 3))
    image = quantizer.resize(jnp.asarray(coarse, jnp.float32), (side, side))
    latent, ids, sums, decoded = _run_twin(sides, np.asarray(image))
    ours = sides.load()
    assert isinstance(ours, Vqvae)
    rows = [row(None, "latent", latent, np.asarray(jax.jit(Vqvae.encode)(ours, image)))]
    total = jnp.zeros(latent.shape, jnp.float32)
    for scale, (tokens, expected) in enumerate(zip(ids, sums, strict=True)):
        grid = (SIDES_256[scale], SIDES_256[scale])
        rest = quantizer.resize(jnp.asarray(latent) - total, grid, "area")
        flat = rest.reshape(1, -1, latent.shape[-1])
        rows.append(_ids_row(ours, flat, tokens, scale, options.tolerance))
        codes = ours.codebook.lookup(jnp.asarray(tokens)).reshape(rest.shape)
        total = ours.codebook.add(total, codes, scale, len(SIDES_256))
        rows.append(row(scale, "code sum", expected, np.asarray(total)))
    picture = jax.jit(Vqvae.decode)(ours, total)
    return (*rows, row(None, "picture", decoded, np.asarray(picture)))


def _ids_row(ours: Vqvae, x: jax.Array, tokens: np.ndarray, scale: int, tolerance: float) -> Row:
    """Agreement of ids; exempt are those whose two nearest codes are about equally far."""
    codes = np.asarray(ours.codebook.codes[...], np.float64)
    points = np.asarray(x, np.float64)
    distance = (points**2).sum(-1, keepdims=True) + (codes**2).sum(-1) - 2 * points @ codes.T
    nearest = np.partition(distance, 1, axis=-1)
    gaps = nearest[..., 1] - nearest[..., 0]
    equal = np.asarray(ours.codebook.nearest(x)) == tokens
    return with_bits(
        Row(scale, "ids", 0.0, 0.0), gaps, equal, 2 * tolerance * float(distance.max())
    )


def _run_twin(
    sides: Sides, image: np.ndarray
) -> tuple[np.ndarray, list[np.ndarray], list[np.ndarray], np.ndarray]:
    with torch.device("meta"):
        twin = VqvaeTwin(sides.config, len(SIDES_256))
    # Its statistics may count the scales of another model; they have no effect.
    del twin.quantize.ema_vocab_hit_SV
    filled = fill_twin(twin, sides)
    assert isinstance(filled, VqvaeTwin)
    with torch.no_grad():
        latent = filled.feature(torch.tensor(image).permute(0, 3, 1, 2))
        ids, sums = filled.tokenize(latent, SIDES_256)
        decoded = filled.decode(sums[-1])
    return (
        _nhwc(latent),
        [part.numpy().astype(np.int32) for part in ids],
        [_nhwc(part) for part in sums],
        _nhwc(decoded),
    )


def _nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())
