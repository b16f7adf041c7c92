"""The benchmark of a block's products, at tiny sizes: what it computes, checks and writes."""

import dataclasses
import json
import sys

import jax.numpy as jnp
import pytest

from benchmarks import kernel_products, kernels
from benchmarks.kernel_products import WAYS


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(kernel_products, "WIDTHS", {"toy": 256})
    monkeypatch.setattr(kernel_products, "TOKENS", {"scale3": 36})


def test_every_way_is_timed_and_right(tiny, tmp_path, monkeypatch):
    asked = ["--cases", "toy/scale3/fc?", "--calls", "1", "--batches", "2", "--name", "products"]
    monkeypatch.setattr(sys, "argv", ["kernels", *asked, "--folder", str(tmp_path)])
    assert kernels.main() == 0
    rows = json.loads((tmp_path / "products.json").read_text())["rows"]
    assert [(row["case"], row["implementation"]) for row in rows] == [
        (f"toy/scale3/{kind}", way.name) for kind in ("fc1", "fc2") for way in WAYS
    ]
    for row in rows:
        assert 0 < row["relative_error"] <= row["tolerance"]
        assert row["batch_rows"] == 2
        assert row["implementation_used"] == "xla"
        assert row["spread_ms"] >= 0
        flops = 2 * (2 * 36) * 1024 * 256
        allowed = (
            0.05 + 1e-4 * row["tflops_kept"] / row["median_ms"]
        )  # what rounding to digits does
        assert row["tflops_kept"] == pytest.approx(flops / row["median_ms"] / 1e9, abs=allowed)
    # fc1 leaves e4m3 for fc2, whose 3 binary digits show, unless it computes in bfloat16.
    rounded = [row["implementation"] for row in rows if row["relative_error"] > 0.01]
    assert rounded == ["ours-int8", "ours-fp8", "xla-int8", "xla-fp8"]


def test_a_wrong_scale_is_seen(tiny):
    product = kernel_products.all_products()[3]
    way = next(way for way in WAYS if way.name == "ours-fp8")
    given = kernel_products.operands(product, 2, way)
    right = kernel_products.call(product, way, **given)
    scale = given["x"].scale.at[1].multiply(1.05)  # of one block of four
    wrong = given | {"x": dataclasses.replace(given["x"], scale=scale)}
    allowed = kernel_products.tolerance(product, way)
    assert kernel_products.error(product, given, right)[1] < allowed
    assert kernel_products.error(product, given, kernel_products.call(product, way, **wrong))[1] > (
        allowed
    )
    nothing = jnp.zeros_like(right)
    assert kernel_products.error(product, given, nothing)[1] == pytest.approx(1)
