"""The table of caches: what it counts, whom it names, and what it leaves to those who claim it."""

import json

import numpy as np
import pytest

from benchmarks import kv_budgets, report
from benchmarks.kv_budgets import CLAIMED, KEPT, Kept


def test_a_tenth_of_the_rows_is_a_tenth_of_the_cache():
    """8B, 1024x1024: 10,624 rows of 40 layers, of which HeatKV's rule leaves a tenth of the 6,425
    of all scales but the last at most: 6.0 % of all.
    """
    full = 40 * 10624 * 2 * 2 * 28 * 128 * 2
    assert kv_budgets.released_cache(Kept("dense"), "infinity_8b") == full
    heads = kv_budgets.released_cache(Kept("per_head('{order}', 0.1)"), "infinity_8b")
    assert 0.9 * 0.1 * 6425 / 10624 < heads / full <= 0.1 * 6425 / 10624


def test_likeness_of_pictures_that_are_the_same_and_of_others():
    dense = np.full((2, 16, 16, 3), 100, np.uint8)
    other = dense.copy()
    other[1] += 10  # an error of 10 levels everywhere: 20 log10(255 / 10) = 28.13 dB
    near = kv_budgets.likeness(other, dense)
    assert (near["same"], near["pictures"]) == (1, 2)
    assert near["psnr"] == pytest.approx((99 + 28.13) / 2, abs=0.01)


def test_times_are_those_of_a_results_file(tmp_path):
    rows = [
        {"model": "infinity_8b", "plan": "dense", "text": "features", "batch": 2, **more}
        for more in (
            {"seconds_median": 3.0},
            {"seconds_median": 2.0, "cache": "lean"},
            {"seconds_median": 1.0, "matrices": "int8"},
            {"failed": "out of memory", "cache": "int8"},
        )
    ]
    (tmp_path / "generate-throughput.json").write_text(json.dumps({"rows": rows}))
    found = kv_budgets.seconds_8b(Kept("dense"), tmp_path)
    assert found == {"seconds": 1.5, "batch": 2, "file": "generate-throughput"}
    assert kv_budgets.seconds_8b(Kept("dense", "int8"), tmp_path) is None


def test_claims_stand_apart_in_the_table(tmp_path, monkeypatch):
    """No number of theirs is in a column of ours."""
    ours = kv_budgets.row_of(KEPT[1], {"psnr": 99.0, "ssim": 1.0, "same": 8, "pictures": 8})
    header = {"device": "cpu", "versions": {}, "date": "today", "commit": "0" * 40}
    content = header | {"rows": [ours, *CLAIMED]}
    (tmp_path / "kv-budgets.json").write_text(json.dumps(content))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = report.table("kv-budgets").splitlines()
    assert lines[2].startswith("| dense | lean | 7.26 | 3.35 | 0.64 | the same bits | 1.000 |")
    for line, claim in zip(lines[3:], CLAIMED, strict=False):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[0] == claim["method"]
        assert not any(cells[1:-1])
        assert cells[-1].startswith(f"claimed, {claim['source']}: ")
