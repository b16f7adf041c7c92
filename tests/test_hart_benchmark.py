"""HART in the benchmark of generations, at a tiny size: drawn as released, and checked."""

import numpy as np
import pytest

from benchmarks import generate_stats as stats
from benchmarks import models
from benchmarks.generate_bench import Bench, measure
from benchmarks.generate_check import check
from sparvar_jax.models.hart_parts import PRESETS
from tests.tiny_hart import CONFIG


@pytest.fixture(scope="module")
def bench():
    """The preset name builds random weights; a smaller shape stands in for the tiny one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "hart_tiny", CONFIG)
        parts = models.build("hart_tiny", dtype="float32")
    made = Bench(parts, 1)
    made.compile([made.plan("dense")])
    return made


def test_it_is_measured_and_checked(bench):
    plan = bench.plan("dense")
    row = measure(bench, plan, repeats=2)
    assert (bench.how, bench.parts.weights) == ("smooth", "random")
    assert row["pixels"] == [48, 48]
    assert len(row["seconds_by_scale"]) == len(CONFIG.sides)
    found = check(bench, plan)
    assert found.problem is None
    assert found.token_agreement > 0.9
    assert found.control_error > found.tolerance.cache


def test_operations_count_blocks_with_the_text(bench):
    """Two rows: products of every token, and (query, key) pairs; text counts as a scale."""
    width, hidden, depth = CONFIG.width, CONFIG.mlp_width, CONFIG.depth
    products = depth * (4 * width**2 + 3 * width * hidden)
    scales = CONFIG.schedule.scales
    tokens = sum(scale.tokens for scale in scales)
    pairs = depth * sum(scale.tokens * scale.end for scale in scales)
    expected = 2 * (2 * products * tokens + 4 * width * pairs) / 1e12
    np.testing.assert_allclose(stats.transformer_tflop(bench, bench.plan("dense")), expected)
