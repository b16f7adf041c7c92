"""Judging what the demo draws: pictures come back out of contact sheets, and hits are hits."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import _record as record
from benchmarks import demo_retrieval
from examples.gallery import PROMPTS, contact_sheet
from examples.train_demo import model_card


@pytest.mark.parametrize("count", [3, 19])
def test_pictures_come_back_out_of_a_contact_sheet(tmp_path, count):
    pictures = np.random.default_rng(0).integers(0, 256, (count, 16, 16, 3), np.uint8)
    columns = min(demo_retrieval.SHEET_COLUMNS, count)
    contact_sheet(pictures, columns).save(tmp_path / "single.webp", lossless=True)
    np.testing.assert_array_equal(
        demo_retrieval.drawn_pictures(tmp_path, "single", count), pictures
    )
    np.save(tmp_path / "single.npy", pictures[:2])
    assert len(demo_retrieval.drawn_pictures(tmp_path, "single", count)) == 2
    assert demo_retrieval.drawn_pictures(tmp_path, "scenes", count) is None


def test_a_sheet_of_fewer_pictures_is_refused(tmp_path):
    contact_sheet(np.zeros((9, 16, 16, 3), np.uint8), 8).save(tmp_path / "single.webp")
    with pytest.raises(ValueError, match="does not show 19 pictures in rows of 8"):
        demo_retrieval.drawn_pictures(tmp_path, "single", 19)


def test_the_card_reads_what_the_benchmarks_write(tmp_path):
    scales = {"3:0.5": {"scenes": {"psnr_mean": 27.25}}}
    record.write_entries("demo_scales", {"settings": scales}, folder=tmp_path)
    found = {"3:0.5": {"retrieval": 0.5, "retrieval_chance": 0.01}}
    entries = {"settings": found, "pictures": "arrays"}
    record.write_entries("demo_retrieval", entries, folder=tmp_path)
    lines = model_card.figure_lines(tmp_path, "3:0.5")
    assert "27.25 dB" in lines
    assert "50.0% (1.0%)" in lines
    assert "judged from arrays" in lines
    assert "50.0%" not in model_card.figure_lines(tmp_path, "5:0.5")


def test_a_hit_is_the_asked_thing_among_the_nearest():
    gallery = np.eye(12, dtype=np.float32)
    points = np.array([f"{i:x}" for i in range(12)])
    # Nearest to furthest: 0, 1, ..., 11; the last two are not among the ten nearest.
    drawn = np.linspace(1, 0.1, 12, dtype=np.float32)[None].repeat(3, 0)
    found = demo_retrieval.hits(drawn, gallery, points, ["0", "9", "a"])
    assert found.tolist() == [True, True, False]


def test_the_fixed_prompts_name_what_they_ask_for():
    lists = json.loads(PROMPTS.read_text())
    assert {name: len(entries) for name, entries in lists.items()} == {
        "single": 32,
        "scenes": 32,
        "retrieval": 200,
    }
    assert all(entry["code_points"] for entries in lists.values() for entry in entries)
