"""BSQ tokenizer against stored arrays: the JAX model and the PyTorch twin, float32 on the CPU.

Everything comes from the sidecars. Images are compared within 1e-4: some 25 convolutions of up to
1,000 terms keep the rounding of values near one below 1e-5, which leaves a factor of ten.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sparvar_convert.torch_twin.bsq_vae import BsqVae as Twin

from sparvar_jax.models import quantizer
from sparvar_jax.models.bsq_vae import BsqVaeConfig, to_uint8
from tests.golden.support import golden_stems, load_golden, most_exempt, state_dict
from tests.released_bsq import load_released

STEMS = golden_stems("bsq_vae_*")
TOLERANCE = 1e-4
# The same latent, some ten additions of codes below one: the rounding of the quantiser itself.
ROUNDING = 2e-6


class Model(NamedTuple):
    """One implementation behind NHWC numpy functions."""

    encode: Callable
    quantise: Callable
    decode: Callable


def configuration(sidecar: dict) -> dict:
    config = sidecar["config"]
    return {
        "code_width": config["codebook_dim"],
        "stride": config["patch_size"],
        "encoder_multipliers": tuple(config["encoder_ch_mult"]),
        "decoder_multipliers": tuple(config["decoder_ch_mult"]),
        "base_width": config["base_ch"],
        "encoder_blocks": config["num_res_blocks"],
        "decoder_blocks": config["num_res_blocks"] + 1,
    }


jitted_quantise = jax.jit(quantizer.quantise, static_argnames=("sizes", "mode"))


def jax_model(sidecar: dict, weights: dict) -> Model:
    model = load_released(BsqVaeConfig(**configuration(sidecar)), weights)
    encode = jax.jit(lambda model, x: model.encode(x))
    decode = jax.jit(lambda model, x: model.decode(x))

    def quantise(latent, sizes, mode):
        return jitted_quantise(jnp.asarray(latent), sizes, mode=mode)

    return Model(lambda x: encode(model, x), quantise, lambda x: decode(model, x))


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


def nhwc(x: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.moveaxis(np.asarray(x), 1, -1)


def torch_model(sidecar: dict, weights: dict) -> Model:
    twin = Twin(**configuration(sidecar))
    twin.load_state_dict({key: torch.from_numpy(value) for key, value in weights.items()})
    twin.requires_grad_(False)

    def quantise(latent, sizes, mode):
        labels, total, inputs = twin.quantise(nchw(latent), list(sizes), mode)
        return [nhwc(x) for x in labels], nhwc(total), [nhwc(x) for x in inputs]

    return Model(
        lambda x: nhwc(twin.encode(nchw(x))), quantise, lambda x: nhwc(twin.decode(nchw(x)))
    )


@pytest.fixture(params=["jax", "torch"])
def implementation(request):
    return {"jax": jax_model, "torch": torch_model}[request.param]


def latent_sizes(sidecar: dict) -> tuple[tuple[int, int], ...]:
    return tuple((height, width) for _, height, width in sidecar["vae_scale_schedule"])


def stored(tensors: dict, name: str, axis: int) -> list[np.ndarray]:
    """Per-scale tensors as NHWC; `axis` is their time axis of size one."""
    keys = sorted(key for key in tensors if key.startswith(f"{name}.scale_"))
    arrays = [np.squeeze(tensors[key], axis) for key in keys]
    return [nhwc(x) if axis == 2 else x for x in arrays]


def residuals(latent: np.ndarray, labels: list[np.ndarray]) -> list[np.ndarray]:
    """Area-resized residual of every scale, in float64, given the stored bits of earlier ones."""
    rest, out = torch.from_numpy(np.moveaxis(latent, -1, 1).astype(np.float64)), []
    for bits in labels:
        size = bits.shape[1:3]
        out.append(nhwc(F.adaptive_avg_pool2d(rest, size)))
        codes = (2 * nchw(bits).double() - 1) / bits.shape[-1] ** 0.5
        rest = rest - F.interpolate(codes, rest.shape[2:], mode="bilinear")
    return out


def check_bits(ours, theirs, margins, tolerance: float, note) -> None:
    """Bits are equal wherever the stored distance to a flip exceeds twice the tolerance."""
    total, exempt = 0, 0
    for scale, (mine, bits, margin) in enumerate(zip(ours, theirs, margins, strict=True)):
        certain = np.abs(margin) > 2 * tolerance
        np.testing.assert_array_equal(
            np.asarray(mine)[certain], bits[certain], err_msg=f"scale {scale}"
        )
        total, exempt = total + bits.size, exempt + int(np.sum(~certain))
    note(f"{exempt} of {total} bits exempt (margin below {2 * tolerance:.0e})")
    assert exempt <= most_exempt(total)


@pytest.mark.parametrize("stem", STEMS)
def test_encoder(stem, implementation, golden_note):
    sidecar, tensors = load_golden(stem)
    model = implementation(sidecar, state_dict(tensors))
    latent = np.asarray(model.encode(nhwc(tensors["input_image"]).astype(np.float32)))
    expected = nhwc(tensors["encoder_output_h"])
    golden_note(f"max error {np.abs(latent - expected).max():.1e}")
    np.testing.assert_allclose(latent, expected, atol=TOLERANCE, rtol=0)
    # Area resizing averages, so residuals given the stored bits are as close as the latents.
    labels = stored(tensors, "bit_indices", axis=1)
    ours = [residual > 0 for residual in residuals(latent, labels)]
    check_bits(ours, labels, residuals(expected, labels), TOLERANCE, golden_note)


@pytest.mark.parametrize("stem", STEMS)
def test_quantiser(stem, implementation, golden_note):
    sidecar, tensors = load_golden(stem)
    model = implementation(sidecar, state_dict(tensors))
    latent = nhwc(tensors["encoder_output_h"])
    expected = stored(tensors, "bit_indices", axis=1)
    for mode, name in (("linear", "trilinear"), ("area", "area")):
        labels, total, inputs = model.quantise(latent, latent_sizes(sidecar), mode)
        check_bits(labels, expected, residuals(latent, expected), ROUNDING, golden_note)
        np.testing.assert_allclose(total, nhwc(tensors["quantized_z"]), atol=ROUNDING, rtol=0)
        for ours, theirs in zip(
            inputs, stored(tensors, f"infinity_input_{name}", axis=2), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("stem", STEMS)
def test_quantiser_on_token_grids(stem):
    """What the transformer sees: patchified where the two schedules differ."""
    sidecar, tensors = load_golden(stem)
    sizes = tuple((height, width) for _, height, width in sidecar["transformer_scale_schedule"])
    patchify = sizes != latent_sizes(sidecar)
    latent = jnp.asarray(nhwc(tensors["encoder_output_h"]))
    ours = quantizer.quantise(latent, sizes, patchify=patchify)

    def tokens(x: np.ndarray) -> np.ndarray:
        return nhwc(F.pixel_unshuffle(nchw(x).float(), 2)) if patchify else x

    expected = [tokens(bits) for bits in stored(tensors, "bit_indices", axis=1)]
    jax.tree.map(np.testing.assert_array_equal, list(ours.labels), expected)
    for mine, theirs in zip(
        ours.inputs, stored(tensors, "infinity_input_trilinear", axis=2), strict=True
    ):
        np.testing.assert_allclose(mine, tokens(theirs), atol=ROUNDING, rtol=0)
    total = quantizer.sum_codes(ours.labels, latent.shape[1:3], patchify)
    np.testing.assert_allclose(total, nhwc(tensors["quantized_z"]), atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("stem", STEMS)
def test_decoder(stem, implementation, golden_note):
    sidecar, tensors = load_golden(stem)
    model = implementation(sidecar, state_dict(tensors))
    image = np.asarray(model.decode(nhwc(tensors["quantized_z"])))
    expected = nhwc(tensors["decoded_image"])
    error = np.abs(image - expected).max()
    golden_note(f"max error {error:.1e}")
    assert error <= TOLERANCE
    picture = np.asarray(to_uint8(jnp.asarray(image))).astype(int)
    stored_picture = tensors["decoded_image_bgr_uint8"][..., ::-1].astype(int)
    exact = (expected.astype(np.float64) + 1) / 2 * 255
    # float32 rounding of the formula itself is below 1e-4 of a step.
    near_step = np.abs(exact - np.round(exact)) <= 127.5 * error + 1e-4
    np.testing.assert_array_equal(picture[~near_step], stored_picture[~near_step])
    assert np.abs(picture - stored_picture).max() <= 1
    golden_note(f"{np.sum(picture != stored_picture)} of {picture.size} pixel values off by one")
