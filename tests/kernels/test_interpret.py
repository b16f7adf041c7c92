"""Kernels without inlined PTX in Pallas's GPU interpreter, with its race detector."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import selection
from pallas_kernels.hopper import reasons

pytestmark = pytest.mark.slow


@pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")
@pytest.mark.skipif(jax.default_backend() != "cpu", reason="the interpreter runs on the CPU")
def test_threshold_kernel_has_no_races():
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.hopper.threshold import row_thresholds

    bits = jnp.asarray(np.random.default_rng(0).integers(0, 1 << 30, (3, 256)), jnp.int32)
    bits = bits.at[:, 200:].set(-1)
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(detect_races=True)):
        got = row_thresholds(bits, 7)
    np.testing.assert_array_equal(got, selection.find_thresholds(bits, 7))
    np.testing.assert_array_equal(got, np.sort(np.asarray(bits), -1)[:, -7])
