"""Judging what the demo draws: pictures come back out of contact sheets, and hits are hits."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")

from benchmarks import _record as record
from benchmarks import demo_retrieval, demo_truth
from examples.gallery import PROMPTS, contact_sheet
from examples.train_demo import captions, model_card
from examples.train_demo.pictures import Collection


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


@pytest.mark.parametrize(
    ("prompt", "first", "second"),
    [
        ("a cup above a cap on a dark green background", (0.27, 0.5), (0.73, 0.5)),
        ("a cup below a cap on a dark green background, noto style", (0.73, 0.5), (0.27, 0.5)),
        ("a cup to the left of a cap on a dark green background", (0.5, 0.27), (0.5, 0.73)),
        ("a cup to the right of a cap on a dark green background", (0.5, 0.73), (0.5, 0.27)),
        ("a cup next to a cap on a dark green background", (0.5, 0.27), (0.5, 0.73)),
    ],
)
def test_a_true_scene_shows_its_things_where_its_caption_says(prompt, first, second):
    pictures = [
        captions.Picture("noto", point, name) for point, name in (("1", "cup"), ("2", "cap"))
    ]
    red_and_blue = np.full((2, 64, 64, 4), 255, np.uint8)
    red_and_blue[0, ..., 1:3] = red_and_blue[1, ..., :2] = 0
    entries = [{"prompt": prompt, "code_points": ["1", "2"]}]
    everything = Collection(pictures, np.arange(2), np.arange(0))
    (picture,) = demo_truth.scenes(entries, everything, red_and_blue)
    for place, colour in ((first, (255, 0, 0)), (second, (0, 0, 255))):
        assert tuple(picture[tuple(int(64 * v) for v in place)]) == colour
    assert picture[2, 2].argmax() == 1


def test_every_fixed_scene_can_be_drawn_as_training_would():
    for entry in json.loads(PROMPTS.read_text())["scenes"]:
        layout, _ = demo_truth.layout_of(entry["prompt"])
        assert len(layout.spots) == len(entry["code_points"]), entry["prompt"]
        assert demo_truth.BACKGROUND.search(entry["prompt"]), entry["prompt"]
    with pytest.raises(ValueError, match="no known arrangement"):
        demo_truth.layout_of("a cup on a white background")
