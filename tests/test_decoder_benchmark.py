"""The benchmark of decoders on small ones: what it counts, writes, and takes for wrong."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import decoder, report


def test_counts_convolutions_and_products_inside_compiled_functions():
    @jax.jit
    def both(x, kernel, table):
        maps = ("NHWC", "HWIO", "NHWC")
        pad = ((1, 1), (1, 1))
        y = jax.lax.conv_general_dilated(x, kernel, (2, 2), pad, dimension_numbers=maps)
        return jnp.einsum("bhwc,cd->bhwd", y, table)

    shapes = [(1, 4, 6, 3), (3, 3, 3, 5), (5, 7)]
    jaxpr = jax.make_jaxpr(both)(*map(jnp.zeros, shapes)).jaxpr
    # Six pixels of five outputs of 27 terms, then of seven outputs of five terms.
    assert decoder.products(jaxpr) == 2 * 6 * (5 * 27 + 7 * 5)


def test_rows_say_what_the_table_shows(tmp_path, monkeypatch):
    assert decoder.main(["--tiny", "--repeats", "2", "--out", str(tmp_path / "toy")]) == 0
    rows = json.loads((tmp_path / "toy" / "decoder-tiny.json").read_text())["rows"]
    places = [(row["case"], row["batch"]) for row in rows]
    assert places == [(case.name, b) for case in decoder.TINY_CASES for b in case.batches]
    one, two = rows[:2]
    assert two["tflop"] == pytest.approx(2 * one["tflop"], rel=0.01)
    assert two["peak_gib"] > one["peak_gib"] > 0
    assert one["images_per_second"] == pytest.approx(1000 / one["median_ms"])
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    assert "tiny bsq_vae | 2 | 32x32 |" in report.table("toy/decoder-tiny")


def test_a_wrong_picture_fails_the_run(tmp_path, monkeypatch, capsys):
    true = decoder.exact

    def other(model, case, codes):
        return true(model, case, codes.at[:, :2].multiply(-1))

    monkeypatch.setattr(decoder, "exact", other)
    monkeypatch.setattr(decoder, "TINY_CASES", decoder.TINY_CASES[:1])
    assert decoder.main(["--tiny", "--repeats", "1", "--out", str(tmp_path)]) == 1
    assert "wrong: tiny bsq_vae" in capsys.readouterr().err


def test_a_flat_truth_proves_nothing():
    row = {"error": 0.0, "tolerance": 0.01}
    assert decoder.is_wrong(row | {"contrast": 0.05})
    assert not decoder.is_wrong(row | {"contrast": 0.5})
