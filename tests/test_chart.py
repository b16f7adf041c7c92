"""The chart of plans: what it calls the frontier, what it says, what it writes."""

import json

import numpy as np
import pytest

from sparvar_jax.cli import main
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import parse_plan, preset_names
from sparvar_jax.study import chart, chart_files
from tests.tiny_model import write_tiny_model

ROWS = [
    {"plan": "dense", "seconds": 4.0, "bits_equal": 1.0},
    {"plan": chart.FLOOR, "seconds": 1.0, "psnr": 70.0, "ssim": 1.0},
    {"plan": "near", "seconds": 3.0, "psnr": 40.0, "ssim": 0.97},
    {"plan": "slow", "seconds": 3.5, "psnr": 30.0, "ssim": 0.9},
    {"plan": "middle", "seconds": 2.0, "psnr": 30.0, "ssim": 0.9},
    {"plan": "quick", "seconds": 1.0, "psnr": 20.0, "ssim": 0.7},
    {"plan": "wild", "seconds": 0.5, "psnr": 10.0, "ssim": 0.2},
    {"plan": "odd", "failed": "it needs more scales"},
]


def test_the_frontier_and_what_to_take():
    best = [row["plan"] for row in chart_files.frontier(ROWS)]
    assert best == ["wild", "quick", "middle", "near"]
    assert chart_files.sentence(ROWS) == (
        "Take near for 'almost lossless', middle for 'balanced' and quick for 'fastest'."
    )
    assert chart_files.sentence(ROWS[:2]).count("dense for") == 3


def test_the_table_shows_every_plan_and_why_one_is_missing():
    lines = chart_files.table(ROWS).splitlines()
    assert lines[2].startswith("| dense | - | - |")
    assert lines[3].startswith("| dense, other kernels (noise floor) | 70.00 |")
    assert lines[4].startswith("| near * | 40.00 | 0.970 |")
    assert lines[-1].startswith("| odd | it needs more scales |")
    assert len({line.count("|") for line in lines}) == 1


def test_bits_that_are_not_drawn_are_not_alike():
    dense = [np.array([[0, 1]]), np.array([[1, 1]])]
    assert chart.bits_equal(dense, [np.array([[0, 0]])]) == 0.25


def test_plans_of_the_chart_are_plans():
    square = infinity_schedule(size="0.25M")
    for text in (*chart.PLANS, *preset_names()):
        parse_plan(text, square, 6)
    assert parse_plan(chart.FLOOR, square, 6).density(1) == pytest.approx(1)


def test_presets_for_wishes_come_first(capsys):
    assert preset_names()[:4] == ("almost-lossless", "balanced", "fastest", "dense")
    assert main(["plans", "--depth", "6"]) == 0
    shown = capsys.readouterr().out
    assert shown.index("almost-lossless") < shown.index("balanced") < shown.index("dense ")


def test_bad_input_is_one_line(tmp_path, capsys):
    assert main(["chart", "--out", str(tmp_path / "out")]) == 2
    assert "give prompts to draw" in capsys.readouterr().err
    assert main(["head-order", "an owl", "--out", str(tmp_path)]) == 2
    assert "must be a file that ends in .json" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
def test_from_prompts_to_files(tmp_path, capsys, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, order = write_tiny_model(tmp_path / "model"), tmp_path / "order.json"
    common = ["--model", str(model), "--size", "0.06M", "--dtype", "float32"]
    assert main(["head-order", "an owl", "a fox", "--out", str(order), *common]) == 0
    plans = ["drop_uncond(1)", f"per_head('{order}', 0.9)", "router()"]
    asked = [part for plan in plans for part in ("--plan", plan)]
    out = tmp_path / "out"
    assert main(["chart", "an owl", "--out", str(out), "--repeats", "0", *asked, *common]) == 0
    assert capsys.readouterr().out.rstrip().endswith("'fastest'.")
    rows = {row["plan"]: row for row in json.loads((out / "chart.json").read_text())["rows"]}
    assert list(rows) == ["dense", *plans]
    assert rows["drop_uncond(1)"]["work"] < 1
    assert rows[plans[1]]["cache_mib"] < rows["dense"]["cache_mib"]
    assert "at least 9 scales" in rows["router()"]["failed"]
    assert {file.name for file in out.iterdir()} == {"chart.json", "chart.md", "chart.png"}
