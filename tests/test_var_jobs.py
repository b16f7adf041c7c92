"""Sampling jobs: the same file whatever happens on the way."""

import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest

from sparvar_jax.pipelines.sampling_jobs import SampleJob, parse_classes, run_job
from tests.hardening.workers import JOB, fake_draw

WORKER = textwrap.dedent(
    """
    import sys, time
    from tests.test_var_jobs import JOB, fake_draw
    from sparvar_jax.pipelines import sampling_jobs

    def draw(labels, seeds):
        time.sleep(0.02)
        return fake_draw(labels, seeds)

    # Joining is slowed down as well, so that kills strike there too.
    join = sampling_jobs._join
    sampling_jobs._join = lambda *args: (time.sleep(0.03), join(*args), time.sleep(0.03))
    print("ready", flush=True)
    sampling_jobs.run_job(JOB, draw, sys.argv[1])
    """
)


def start(out) -> subprocess.Popen:
    worker = subprocess.Popen(
        [sys.executable, "-c", WORKER, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert worker.stdout.readline() == b"ready\n", worker.stderr.read()
    return worker


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


def test_kills_at_random_points_change_nothing(tmp_path):
    """At least 20 kills, spread over drawing and joining; jobs that finish start over elsewhere."""
    whole = tmp_path / "whole.npz"
    run_job(JOB, fake_draw, whole)
    draw, kills, finished = random.Random(0), 0, 0
    out = tmp_path / "run0.npz"
    while kills < 20 or not finished:
        worker = start(out)
        time.sleep(draw.uniform(0, 0.15))
        worker.send_signal(signal.SIGKILL)
        kills += worker.wait() == -signal.SIGKILL
        worker.communicate()
        if draw.random() < 0.1:
            assert start(out).wait() == 0
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            finished += 1
            out = tmp_path / f"run{finished}.npz"
    assert start(out).wait() == 0
    assert out.read_bytes() == whole.read_bytes()


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
