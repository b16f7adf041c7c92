"""Picture measures of the quality benchmark against scikit-image and by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.study import features
from sparvar_jax.study.picture_metrics import ms_ssim, object_box, psnr, ssim

skimage_metrics = pytest.importorskip("skimage.metrics")


def pictures(side: int = 192):
    draw = np.random.default_rng(0)
    smooth = np.kron(draw.random((side // 16, side // 16, 3)), np.ones((16, 16, 1)))
    noisy = np.clip(smooth + draw.normal(0, 0.05, smooth.shape), 0, 1)
    return smooth.astype(np.float32), noisy.astype(np.float32)


def test_psnr_and_ssim_match_scikit_image():
    a, b = pictures()
    where = jnp.ones((1, *a.shape[:2]))
    expected = skimage_metrics.peak_signal_noise_ratio(a, b, data_range=1)
    np.testing.assert_allclose(psnr(a[None], b[None], where), expected, rtol=1e-5)
    expected = skimage_metrics.structural_similarity(
        a, b, channel_axis=-1, data_range=1, gaussian_weights=True, sigma=1.5,
        use_sample_covariance=False,
    )  # fmt: skip
    np.testing.assert_allclose(ssim(a[None], b[None], where), expected, atol=1e-4)


def test_only_the_weighted_part_counts():
    a, b = pictures()
    b[:96] = a[:96]
    top, bottom = np.zeros((2, 1, 192, 192), np.float32)
    top[:, :80], bottom[:, 112:] = 1, 1
    both, other = jnp.asarray(a)[None], jnp.asarray(b)[None]
    assert float(psnr(both, other, top)[0]) == 99
    assert float(ssim(both, other, top)[0]) == pytest.approx(1, abs=1e-6)
    assert float(psnr(both, other, bottom)[0]) < 40


def test_ms_ssim_orders_and_peaks():
    a, b = (jnp.asarray(x)[None] for x in pictures())
    where = jnp.ones((1, 192, 192))
    coarse = jax.jit(ms_ssim)  # one program instead of hundreds
    assert float(coarse(a, a, where)[0]) == pytest.approx(1, abs=1e-5)
    assert float(ssim(a, b, where)[0]) < float(coarse(a, b, where)[0]) < 1


def test_object_box_by_hand():
    picture = np.full((40, 40, 3), 0.8)
    picture[10:20, 15:30] = 0.1
    assert object_box(picture, margin=2) == (slice(8, 22), slice(13, 32))
    assert object_box(np.full((40, 40, 3), 0.8)) == (slice(0, 40), slice(0, 40))


@pytest.mark.skipif(not features.STORED.is_file(), reason="network weights are not stored here")
def test_the_network_is_the_published_one():
    data = pytest.importorskip("skimage.data")
    cat = data.chelsea()[38:262, 110:334] / 255
    logits = features.class_logits(features.load(), jnp.asarray(cat, jnp.float32)[None])
    assert int(logits.argmax()) in (281, 282, 285)  # tabby, tiger and Egyptian cat
