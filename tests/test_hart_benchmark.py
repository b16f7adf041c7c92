"""HART in the benchmark of generations, at a tiny size: drawn as released, and checked."""

import functools

import numpy as np
import pytest

from benchmarks import generate_stats as stats
from benchmarks import models
from benchmarks.generate_bench import Bench, measure
from benchmarks.generate_check import check
from sparvar_jax.models.hart_parts import PRESETS
from sparvar_jax.models.vqvae import VqvaeConfig
from tests.tiny_hart import CONFIG


@pytest.fixture(scope="module")
def bench():
    """Random weights by the name of a preset; smaller shapes stand in for it."""
    small = functools.partial(VqvaeConfig, base_width=32, multipliers=(1, 2), blocks=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "hart_tiny", CONFIG)
        patch.setattr(models, "VqvaeConfig", small)
        return Bench(models.build("hart_tiny", dtype="float32"), 1)


@pytest.mark.slow
def test_it_is_measured_and_checked(bench):
    plan = bench.plan("dense")
    bench.compile([plan])
    row = measure(bench, plan, repeats=2)
    assert (bench.how, bench.parts.weights) == ("smooth", "random")
    assert row["pixels"] == [6, 6]
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
