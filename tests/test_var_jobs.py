"""Sampling jobs: the same file whatever happens on the way."""

import os
import random

import numpy as np
import pytest

from sparvar_jax.pipelines.sampling_jobs import SampleJob, parse_classes, run_job
from tests.hardening.workers import JOB, fake_draw


def test_uninterrupted_file(tmp_path):
    out, calls = tmp_path / "samples.npz", []
    assert run_job(JOB, fake_draw, out, lambda *call: calls.append(call))
    with np.load(out) as archive:
        pictures, labels = archive["arr_0"], archive["arr_1"]
    np.testing.assert_array_equal(labels, [3] * 7 + [1] * 7 + [7] * 7)
    np.testing.assert_array_equal(pictures, fake_draw(labels, range(100, 121)))
    assert calls == [("sample", done, 6) for done in range(1, 7)]
    assert os.listdir(tmp_path) == ["samples.npz"]
    assert not run_job(JOB, lambda *_: pytest.fail("a finished job draws nothing"), out)


def test_no_batch_is_drawn_twice(tmp_path):
    drawn: list[int] = []

    def fragile(labels, seeds):
        if random.Random(len(drawn)).random() < 0.5 and drawn and drawn[-1] != -1:
            drawn.append(-1)
            raise KeyboardInterrupt
        drawn.append(seeds[0])
        return fake_draw(labels, seeds)

    out = tmp_path / "samples.npz"
    for _ in range(40):
        try:
            run_job(JOB, fragile, out)
            break
        except KeyboardInterrupt:
            continue
    assert [seed for seed in drawn if seed != -1] == [100, 104, 108, 112, 116, 120]
    assert -1 in drawn


def test_other_jobs_are_kept_apart(tmp_path):
    out, other = tmp_path / "samples.npz", SampleJob((3,), per_class=7, batch=4)

    def fails(labels, seeds):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_job(JOB, fails, out)
    with pytest.raises(ValueError, match="of another job"):
        run_job(other, fake_draw, out)
    run_job(JOB, fake_draw, out)
    with pytest.raises(ValueError, match="another job"):
        run_job(other, fake_draw, out)


def test_one_process_at_a_time(tmp_path):
    def again(labels, seeds):
        run_job(JOB, fake_draw, tmp_path / "samples.npz")

    with pytest.raises(ValueError, match="another process"):
        run_job(JOB, again, tmp_path / "samples.npz")


@pytest.mark.parametrize(
    ("text", "classes"),
    [("all", range(12)), ("3", [3]), ("0-2,7", [0, 1, 2, 7]), ("5,5-6", [5, 6])],
)
def test_classes_from_text(text, classes):
    assert parse_classes(text, 12) == tuple(classes)


@pytest.mark.parametrize("text", ["", "cat", "12", "-1", "3-", "5-3"])
def test_impossible_classes_are_refused(text):
    with pytest.raises(ValueError, match="classes must"):
        parse_classes(text, 12)


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(ValueError, match="folder does not exist"):
        run_job(JOB, fake_draw, tmp_path / "none" / "samples.npz")
    with pytest.raises(ValueError, match=r"\.npz"):
        run_job(JOB, fake_draw, tmp_path / "samples.npy")
