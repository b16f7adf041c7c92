"""Twin and conversion side by side: equal ones pass, a changed weight is found and placed."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from sparvar_convert.compare import compare_source, write_report
from sparvar_convert.run import convert_source
from sparvar_convert.side_by_side import Options, Row, row, with_bits

from tests.convert import sources

OPTIONS = Options(aspect_ratio=1.5)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    file = tmp_path_factory.mktemp("compare") / "infinity.pth"
    torch.save(sources.infinity_weights(), file)
    return file


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    file = tmp_path_factory.mktemp("compare") / "tokenizer.pth"
    torch.save({"vae": sources.tokenizer_weights()}, file)
    return file


def test_an_equal_transformer_passes_at_every_scale_and_layer(transformer, tmp_path):
    found = compare_source(transformer, options=OPTIONS)
    depth = sources.INFINITY.depth
    assert found.passed
    assert len(found.rows) == 7 * (depth + 3) + 1
    assert {(r.scale, r.layer) for r in found.rows} >= {(6, f"block {i}") for i in range(depth)}
    # Float32 against float32: far below the tolerance, or the tolerance proves nothing.
    assert max(r.relative for r in found.rows) < 1e-5
    assert all(r.bits is not None for r in found.rows if r.layer == "guided logits")
    report, plot = write_report(found, tmp_path / "report.json")
    content = json.loads(report.read_text())
    assert content["passed"]
    assert len(content["rows"]) == len(found.rows)
    with Image.open(plot) as picture:
        assert picture.size == (960, 540)


def test_a_changed_weight_fails_from_its_layer_on(transformer, tmp_path):
    weights = torch.load(transformer, weights_only=True)
    key = next(k for k in weights if k.startswith("block_chunks.1.module.0.ffn.fc2.bias"))
    weights[key] = weights[key] + 0.01
    torch.save(weights, tmp_path / "other.pth")
    convert_source(tmp_path / "other.pth", tmp_path / "model")
    found = compare_source(transformer, tmp_path / "model", OPTIONS)
    assert not found.passed
    failing = [r.layer for r in found.rows if r.scale == 0 and not r.within(1e-4)]
    assert failing[0] == "block 2"
    assert "input" not in failing


def test_an_equal_tokenizer_passes(tokenizer):
    found = compare_source(tokenizer, options=OPTIONS)
    assert found.passed
    assert [r.layer for r in found.rows] == ["latent", *["bits"] * 7, "code sum", "picture"]
    assert all(r.bits > 0.99 for r in found.rows if r.layer == "bits")
    other = compare_source(tokenizer, options=dataclasses.replace(OPTIONS, seed=1))
    assert other.rows != found.rows


def test_sources_and_folders_that_do_not_fit_are_refused(transformer, tokenizer, tmp_path):
    sources.text_folder(tmp_path / "text")
    with pytest.raises(ValueError, match="no PyTorch twin"):
        compare_source(tmp_path / "text")
    convert_source(tokenizer, tmp_path / "model")
    with pytest.raises(ValueError, match="has nothing as its transformer"):
        compare_source(transformer, tmp_path / "model")
    with pytest.raises(ValueError, match="does not exist"):
        compare_source(transformer, tmp_path / "none")


def test_rows_measure_differences():
    found = row(3, "x", np.array([1.0, -4.0]), np.array([1.0, -3.0]))
    assert found == Row(3, "x", 1.0, 0.25)
    assert not row(0, "x", np.ones(2), np.array([1.0, np.nan])).within(1.0)
    gaps, equal = np.array([0.1, 0.5, 0.5]), np.array([False, True, False])
    bits = with_bits(found, gaps, equal, slack=0.2)
    assert (bits.exempt, bits.flipped) == (1, 1)
    assert bits.bits == pytest.approx(1 / 3)
    assert not bits.within(1.0)
    assert with_bits(found, gaps, equal, slack=0.5).within(0.25)
