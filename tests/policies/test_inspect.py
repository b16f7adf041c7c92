"""Measures of attention against plain numpy, and an inspected generation of a tiny model."""

import json

import numpy as np
import pytest

from sparvar_jax.plans.strategy import Place, View
from sparvar_jax.policies.csla import Csla
from sparvar_jax.study import inspection
from sparvar_jax.study.inspection import Options
from tests.policies.support import SMALL, cache
from tests.policies.test_csla import SMALL_WINDOWS, rule
from tests.tiny_model import write_tiny_model


@pytest.mark.parametrize("layout", ["packed", "aligned"])
def test_measures(layout):
    options = Options(block=32, windows=SMALL_WINDOWS, sinks=3)
    place = Place(SMALL, layout, 6)
    q, k, _ = cache(place)
    found = inspection.measure(q, k, place, options)
    scores = np.asarray(q[0] @ k[0].swapaxes(1, 2)[..., place.rows.physical(6)], np.float64)
    mass = np.exp(scores - scores.max(-1, keepdims=True))
    mass /= mass.sum(-1, keepdims=True)
    mask = rule(place, SMALL_WINDOWS, 3)
    np.testing.assert_allclose(found["sinks"], mass[:, :, :14].sum(-1).mean(-1), atol=1e-5)
    np.testing.assert_allclose(found["inside"], (mass * mask).sum(-1).mean(-1), atol=1e-5)
    rows, keys = -(-mass.shape[1] // 32) * 32, -(-mass.shape[2] // 32) * 32
    padded = np.zeros((2, rows, keys))
    padded[:, : mass.shape[1], : mass.shape[2]] = mass
    blocks = padded.reshape(2, rows // 32, 32, keys // 32, 32).sum((2, 4))
    shares = blocks / blocks.sum(-1, keepdims=True)
    np.testing.assert_allclose(found["map"], shares, atol=1e-5)
    kept = inspection.kept_blocks(
        Csla(SMALL_WINDOWS, 3, "boxes", exact=True), q, View(k, k), place, {}, options.block
    )
    padded[:, : mass.shape[1], : mass.shape[2]] = mask
    read = padded.reshape(2, rows // 32, 32, keys // 32, 32).any((2, 4))
    np.testing.assert_array_equal(np.asarray(kept) > 1e-7, read)


def test_likeness_of_a_map_with_itself_carried():
    place = Place(SMALL, "packed", 6)
    queries, keys = inspection.carry_matrices(place, 5, 32, 32)
    before = np.random.default_rng(0).random((2, queries.shape[1], keys.shape[0]))
    now = np.einsum("Aa,hab,bB->hAB", queries, before, keys)
    np.testing.assert_allclose(inspection.likeness(before, now, place, 32), 1, atol=1e-9)


def test_inspecting_a_generation(tmp_path):
    pytest.importorskip("matplotlib")
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.study.report import inspect_prompt

    pipe = Pipeline.from_checkpoint(write_tiny_model(tmp_path / "model"), dtype="float32")
    options = Options(scales=2, block=64)
    rows = inspect_prompt(pipe, "a red apple", tmp_path / "out", plan="dense", options=options)
    assert [(row["scale"], row["layer"]) for row in rows] == [(5, 0), (5, 1), (6, 0), (6, 1)]
    for row in rows:
        assert len(row["sinks"]) == 2
        assert all(0 < s <= i <= 1 for s, i in zip(row["sinks"], row["inside"], strict=True))
        assert row["covered"] == pytest.approx([1, 1], abs=1e-5)
    assert rows[0]["likeness"] is None
    assert min(rows[2]["likeness"]) > 0.5
    stored = json.loads((tmp_path / "out" / "inspect.json").read_text())
    assert stored["rows"] == rows
    names = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert names == {
        "sinks.png",
        "inside.png",
        "likeness.png",
        "covered.png",
        "maps-5.png",
        "maps-6.png",
    }
