"""The quality benchmark from a model directory to its files, with a tiny model."""

import json
import sys

import pytest

from benchmarks import _record as record
from benchmarks import quality, report
from benchmarks.quality_plans import DEFAULT_PLANS, LABELS
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import parse_plan
from tests.tiny_model import write_tiny_model

SUBSETS_OF_FILES = ("single", "scenes", "boxes", "prompts")
PLANS = ("dense/xla", "sparvar-fast", "adaptive(0.8)", "skip_last_scales(1)")


def test_every_plan_of_the_table_is_a_plan():
    square = infinity_schedule()
    dense = parse_plan("dense", square, 6)
    for text in DEFAULT_PLANS:
        plan = parse_plan(text.partition("/")[0], square, 6)
        assert (plan == dense) == text.startswith("dense"), text
    assert len(set(LABELS.values())) == len(LABELS)


def test_prompts_of_both_kinds(tmp_path):
    lines = tmp_path / "lines.txt"
    lines.write_text("a red apple\n\nan owl\n")
    assert quality.read_prompts(lines, None) == [("prompts", "a red apple"), ("prompts", "an owl")]
    lists = tmp_path / "lists.json"
    lists.write_text(json.dumps({"single": [{"prompt": "an owl"}], "scenes": ["a", "b"]}))
    assert quality.read_prompts(lists, 1) == [("single", "an owl"), ("scenes", "a")]
    lists.write_text("{}")
    with pytest.raises(ValueError, match="must hold lists named single or scenes"):
        quality.read_prompts(lists, None)


def test_tables_show_scenes_or_a_list_of_prompts(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    rows = [{"plan": "skip_last_scales(1)", "subset": s, "psnr": 30.0} for s in SUBSETS_OF_FILES]
    for subset, row in zip(SUBSETS_OF_FILES, rows, strict=True):
        record.write(f"quality-{subset}", [row], folder=tmp_path)
        assert ("| skip 1 | 30.00 |" in report.table(f"quality-{subset}")) == (
            subset in ("scenes", "prompts")
        )


@pytest.mark.slow
def test_from_model_to_files(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    model = write_tiny_model(tmp_path / "model")
    arguments = [
        "quality", str(model), "--limit", "1", "--teacher", "1", "--out", str(tmp_path),
        "--sheets", "sparvar-fast", "--dtype", "float32", "--plans", *PLANS,
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", arguments)
    quality.main()
    content = json.loads((tmp_path / "quality.json").read_text())
    rows = {(row["plan"], row["subset"]): row for row in content["rows"]}
    assert {"device", "versions", "date", "commit", "xla_flags", "rows"} == set(content)
    assert {subset for _, subset in rows} == {"single", "scenes", "boxes"}
    assert rows["dense/xla", "single"]["psnr"] > 60
    assert rows["dense/xla", "single"]["bit_agreement"] == 1
    fast, skipped = rows["sparvar-fast", "scenes"], rows["skip_last_scales(1)", "scenes"]
    assert fast["density"] < 1
    assert fast["psnr"] > skipped["psnr"]
    assert skipped["bit_agreement"] is None
    assert fast["logit_error_by_scale"][0] < 1e-4 < fast["logit_error_by_scale"][-1]
    assert rows["adaptive(0.8)", "scenes"]["density"] < 1
    assert {path.name for path in tmp_path.glob("quality-*.*")} == {
        "quality-sparvar-fast.webp",
        *(f"quality-{s}-{w}.png" for s in ("single", "scenes") for w in ("density", "seconds")),
    }
