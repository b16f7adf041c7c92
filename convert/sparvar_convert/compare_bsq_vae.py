"""The BSQ tokenizer side by side: latent, bits of every scale, the picture from the same codes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import torch

from sparvar_convert.side_by_side import Options, Row, Sides, fill_twin, row, with_bits
from sparvar_convert.torch_twin.bsq_vae import BsqVae as Twin
from sparvar_convert.torch_twin.bsq_vae import Quantised
from sparvar_jax.models import quantizer
from sparvar_jax.models.bsq_vae import BsqVae
from sparvar_jax.plans.schedule import infinity_schedule

_SMOOTHING = 8


def compare(sides: Sides, options: Options) -> tuple[Row, ...]:
    """A made-up picture through both: encoder, quantiser (on the twin's latent), decoder."""
    sizes = infinity_schedule(1 / options.aspect_ratio, options.size).sizes
    stride = sides.config.stride
    image = _picture(sizes[-1][0] * stride, sizes[-1][1] * stride, options.seed)
    latent, quantised, decoded = _run_twin(sides, image, sizes)
    ours = sides.load()
    assert isinstance(ours, BsqVae)
    found = jax.jit(BsqVae.encode)(ours, jnp.asarray(image))
    rows = [row(None, "latent", latent, np.asarray(found))]
    replayed = quantizer.quantise(jnp.asarray(latent), sizes)
    residual = latent
    for index, (theirs, labels) in enumerate(zip(quantised.labels, replayed.labels, strict=True)):
        bits = _nhwc(theirs)
        small = np.asarray(quantizer.resize(jnp.asarray(residual), sizes[index], "area"))
        slack = 2 * options.tolerance * float(np.abs(latent).max())
        exact = Row(index, "bits", 0.0, 0.0)
        rows.append(with_bits(exact, np.abs(small), bits == np.asarray(labels), slack))
        codes = quantizer.labels_to_codes(jnp.asarray(bits))
        residual = residual - np.asarray(quantizer.resize(codes, sizes[-1]))
    forced = tuple(jnp.asarray(_nhwc(labels)) for labels in quantised.labels)
    code_sum = quantizer.sum_codes(forced, sizes[-1])
    rows.append(row(None, "code sum", _nhwc(quantised.code_sum), np.asarray(code_sum)))
    picture = jax.jit(BsqVae.decode)(ours, code_sum)
    return (*rows, row(None, "picture", decoded, np.asarray(picture)))


def _run_twin(
    sides: Sides, image: np.ndarray, sizes: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, Quantised, np.ndarray]:
    config = sides.config
    with torch.device("meta"):
        twin = Twin(
            config.code_width,
            config.stride,
            config.encoder_multipliers,
            config.decoder_multipliers,
            config.base_width,
            config.encoder_blocks,
            config.decoder_blocks,
        )
    filled = fill_twin(twin, sides)
    assert isinstance(filled, Twin)
    with torch.no_grad():
        latent = filled.encode(torch.tensor(image).permute(0, 3, 1, 2))
        quantised = filled.quantise(latent, list(sizes))
        return _nhwc(latent), quantised, _nhwc(filled.decode(quantised.code_sum))


def _nhwc(x: torch.Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.permute(0, 2, 3, 1).numpy())


def _picture(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth random colours in [-1, 1], NHWC: noise alone would exercise few code paths."""
    draw = np.random.default_rng(seed)
    coarse = draw.uniform(-1, 1, (1, -(-height // _SMOOTHING), -(-width // _SMOOTHING), 3))
    image = quantizer.resize(jnp.asarray(coarse, jnp.float32), (height, width))
    return np.asarray(image)
