"""PNG files: what they say, and that they appear whole or not at all."""

import os
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from sparvar_jax.pipelines import metadata
from sparvar_jax.weights.files import whole_file

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 4, 3)).astype(np.uint8)


def test_pixels_and_text_survive(tmp_path):
    told = {"prompt": "ein süßer Apfel 苹果", "seed": "7"}
    with whole_file(tmp_path / "a.png") as path:
        metadata.write_png(path, PIXELS, told)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), PIXELS)
    assert metadata.read_metadata(tmp_path / "a.png") == told
    assert (tmp_path / "a.png").stat().st_mode & 0o044


def test_nothing_is_left_of_a_failed_file(tmp_path):
    (tmp_path / "a.png").write_text("before")

    def fail():
        with whole_file(tmp_path / "a.png") as path:
            path.write_text("half")
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail()
    assert os.listdir(tmp_path) == ["a.png"]
    assert (tmp_path / "a.png").read_text() == "before"


@pytest.mark.parametrize(
    ("place", "message"),
    [("none/a.png", "does not exist"), ("", "is a folder"), ("file/a.png", "cannot write")],
)
def test_places_that_cannot_be_written_are_refused(tmp_path, place, message):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=message), whole_file(tmp_path / place):
        pass
    assert os.listdir(tmp_path) == ["file"]


def test_other_pictures_are_refused(tmp_path):
    Image.fromarray(PIXELS).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="not a PNG file, but JPEG"):
        metadata.read_metadata(tmp_path / "a.jpg")


def test_versions_name_what_decides_the_numbers():
    assert {"sparvar-jax", "jax", "numpy"} <= metadata.versions().keys()


def test_files_written_at_once_leave_the_umask_alone(tmp_path, monkeypatch):
    """It is the whole process's, and reading it sets it."""
    umask = os.umask

    def slow_umask(mask):
        before = umask(mask)
        time.sleep(0.002)  # so that threads meet between reading and setting it again
        return before

    def write(name):
        with whole_file(tmp_path / str(name)) as path:
            path.write_text("whole")

    before = umask(0o027)
    try:
        with monkeypatch.context() as patch, ThreadPoolExecutor(8) as pool:
            patch.setattr(os, "umask", slow_umask)
            list(pool.map(write, range(24)))
        assert umask(0o027) == 0o027
    finally:
        umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o640}
