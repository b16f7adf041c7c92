"""Quantiser: resizing and shuffling against PyTorch, quantisation against its definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from sparvar_jax.models import quantizer

PAIRS = [(1, 7), (2, 64), (7, 7), (16, 64), (20, 13), (45, 90), (64, 48), (64, 1), (111, 100)]
# A centre near 111 may round to the next float32 (8e-6) and moves the value by that much times the
# difference of two neighbours (about 3).
TOLERANCE = 2.4e-5


def as_nhwc(x: torch.Tensor) -> np.ndarray:
    return x.permute(0, 2, 3, 1).numpy()


def torch_resize(x: torch.Tensor, size: tuple[int, int], mode: str) -> torch.Tensor:
    if mode == "area":
        return F.adaptive_avg_pool2d(x, size)
    if mode == "bicubic":
        return F.interpolate(x, size, mode="bicubic", align_corners=False)
    volume = F.interpolate(x[:, :, None], (1, *size), mode="trilinear", align_corners=False)
    return volume[:, :, 0]


@pytest.mark.parametrize("mode", ["linear", "area", "bicubic"])
@pytest.mark.parametrize(("source", "target"), PAIRS)
def test_resize_equals_torch(source, target, mode):
    x = torch.randn(2, 3, source, target, generator=torch.Generator().manual_seed(0))
    size = (target, source)
    ours = quantizer.resize(jnp.asarray(as_nhwc(x)), size, mode)
    np.testing.assert_allclose(ours, as_nhwc(torch_resize(x, size, mode)), atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["linear", "area", "bicubic"])
def test_resize_matrix_rows_sum_to_one_and_is_read_only(mode):
    matrix = quantizer.resize_matrix(48, 64, mode)
    np.testing.assert_allclose(matrix.sum(axis=1), 1, atol=1e-6)
    assert not matrix.flags.writeable


def test_resize_shrinks_without_antialiasing():
    matrix = quantizer.resize_matrix(8, 2, "linear")
    # Centres fall at 1.5 and 5.5: two neighbours each, nothing of the others.
    expected = [[0, 0.5, 0.5, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0.5, 0.5, 0]]
    np.testing.assert_array_equal(matrix, expected)


def test_resize_matrix_refuses_an_empty_axis():
    with pytest.raises(ValueError, match="must be positive, got source=0"):
        quantizer.resize_matrix(0, 4)


def test_pixel_order_equals_torch():
    x = torch.arange(2 * 8 * 3 * 5, dtype=torch.float32).reshape(2, 8, 3, 5)
    shuffled = quantizer.pixel_shuffle(jnp.asarray(as_nhwc(x)))
    np.testing.assert_array_equal(shuffled, as_nhwc(F.pixel_shuffle(x, 2)))
    np.testing.assert_array_equal(quantizer.pixel_unshuffle(shuffled), as_nhwc(x))


def test_pixel_order_refuses_odd_shapes():
    with pytest.raises(ValueError, match="multiple of 4"):
        quantizer.pixel_shuffle(jnp.zeros((1, 2, 2, 6)))
    with pytest.raises(ValueError, match="even height"):
        quantizer.pixel_unshuffle(jnp.zeros((1, 3, 2, 6)))


def reference_quantise(latent: torch.Tensor, sizes) -> tuple[list, torch.Tensor, list]:
    """The definition in PyTorch, NCHW, with the normalisation the released code has."""
    final, width = sizes[-1], latent.shape[1]
    residual, total, labels, inputs = latent.clone(), torch.zeros_like(latent), [], []
    for index, size in enumerate(sizes):
        if index:
            inputs.append(torch_resize(total, size, "linear"))
        unit = F.normalize(F.adaptive_avg_pool2d(residual, size), dim=1, eps=1e-12)
        labels.append((unit > 0).to(torch.int8))
        code = torch.where(unit > 0, 1.0, -1.0) / width**0.5
        code = torch_resize(code, final, "linear")
        residual, total = residual - code, total + code
    return labels, total, inputs


SIZES = ((1, 1), (2, 2), (3, 2), (6, 4))


@pytest.mark.parametrize("patchify", [False, True])
def test_quantise_equals_definition(patchify):
    latent_sizes = tuple(quantizer.latent_size(size, patchify) for size in SIZES)
    latent = torch.randn(2, 5, *latent_sizes[-1], generator=torch.Generator().manual_seed(1))
    labels, total, inputs = reference_quantise(latent, latent_sizes)
    if patchify:
        labels = [F.pixel_unshuffle(x.float(), 2).to(torch.int8) for x in labels]
        inputs = [F.pixel_unshuffle(x, 2) for x in inputs]
    ours = quantizer.quantise(jnp.asarray(as_nhwc(latent)), SIZES, patchify=patchify)
    assert all(x.dtype == jnp.int8 for x in ours.labels)
    for mine, theirs in zip(ours.labels, labels, strict=True):
        np.testing.assert_array_equal(mine, as_nhwc(theirs))
    for mine, theirs in zip(ours.inputs, inputs, strict=True):
        np.testing.assert_allclose(mine, as_nhwc(theirs), atol=TOLERANCE)
    np.testing.assert_allclose(ours.code_sum, as_nhwc(total), atol=TOLERANCE)
    rebuilt = quantizer.sum_codes(ours.labels, latent_sizes[-1], patchify)
    np.testing.assert_allclose(rebuilt, ours.code_sum, atol=TOLERANCE)


def test_quantise_counts_zero_as_negative():
    ours = quantizer.quantise(jnp.zeros((1, 1, 1, 4)), ((1, 1),))
    np.testing.assert_array_equal(ours.labels[0], np.zeros((1, 1, 1, 4)))
    np.testing.assert_array_equal(ours.code_sum, np.full((1, 1, 1, 4), -0.5))


def test_quantise_refuses_a_schedule_of_another_size():
    with pytest.raises(ValueError, match=r"must cover the latent grid \(8, 8\), got \(6, 4\)"):
        quantizer.quantise(jnp.zeros((1, 8, 8, 4)), SIZES)


def test_flips_corrupt_the_history_and_leave_labels_right():
    # Scales at full size make the second input the corrupted sum itself.
    latent = jax.random.normal(jax.random.key(0), (3, 16, 16, 8))
    sizes, strength = ((16, 16), (16, 16)), 0.3
    out = quantizer.quantise(latent, sizes, flip=(jax.random.key(1), strength))
    history = np.asarray(out.inputs[0])
    np.testing.assert_array_equal(out.labels[0], np.asarray(latent) > 0)
    np.testing.assert_array_equal(out.labels[1], np.asarray(latent) - history > 0)
    rates = np.mean((history > 0) != np.asarray(out.labels[0]), axis=(1, 2, 3))
    deviation = (strength * (1 - strength) / latent[0].size) ** 0.5
    assert len(set(rates)) == 3
    assert np.all((rates > 0) & (rates < strength + 4 * deviation))


def test_no_flips_at_strength_zero():
    latent = jax.random.normal(jax.random.key(0), (2, 6, 4, 8))
    clean = quantizer.quantise(latent, SIZES)
    same = quantizer.quantise(latent, SIZES, flip=(jax.random.key(1), 0.0))
    jax.tree.map(np.testing.assert_array_equal, same, clean)
