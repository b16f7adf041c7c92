"""Sampling jobs whose parts are damaged, lost or in the way still end with the same file."""

import json
import os
import random
import signal

import numpy as np
import pytest

from sparvar_jax.pipelines import sample_parts
from sparvar_jax.pipelines.sampling_jobs import SampleJob, parts_folder, run_job
from tests.hardening.workers import JOB, fake_draw


class Stop(Exception):
    """Ends a job between two batches."""


def stopped(out, after=4):
    """A job that has drawn some batches; the folder of its parts."""
    left = [after]

    def draw(labels, seeds):
        left[0] -= 1
        if left[0] < 0:
            raise Stop
        return fake_draw(labels, seeds)

    with pytest.raises(Stop):
        run_job(JOB, draw, out)
    return parts_folder(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "whole.npz"
    run_job(JOB, fake_draw, out)
    return out.read_bytes()


def flip(content):
    return content[:200] + bytes([content[200] ^ 1]) + content[201:]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[:-1],
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: bytes(len(content)),
        flip,
        lambda content: content + b"more",
        lambda content: b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 65535,
    ],
    ids=["short", "half", "empty", "zeros", "one bit", "long", "header"],
)
@pytest.mark.parametrize("index", [0, 2])
def test_damaged_parts_are_drawn_again(tmp_path, whole, damage, index):
    out = tmp_path / "out.npz"
    part = stopped(out) / f"{index:06d}.npy"
    part.write_bytes(damage(part.read_bytes()))
    drawn = []

    def draw(labels, seeds):
        drawn.append((seeds[0] - JOB.seed) // JOB.batch)
        return fake_draw(labels, seeds)

    assert run_job(JOB, draw, out)
    assert drawn == sorted([index, 4, 5])
    assert out.read_bytes() == whole
    assert os.listdir(tmp_path) == ["out.npz"]


def test_parts_of_another_size_are_drawn_again(tmp_path, whole):
    out = tmp_path / "out.npz"
    folder = stopped(out)
    sample_parts.save(folder, 1, fake_draw([3] * 4, range(104, 108))[:, :3])
    assert run_job(JOB, fake_draw, out)
    assert out.read_bytes() == whole


def test_pictures_of_two_sizes_are_refused(tmp_path):
    def draw(labels, seeds):
        return fake_draw(labels, seeds)[:, : 5 if seeds[0] == JOB.seed else 6]

    with pytest.raises(ValueError, match="of one size"):
        run_job(JOB, draw, tmp_path / "out.npz")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff", b"{}" * 10])
def test_a_damaged_description_is_named(tmp_path, content):
    out = tmp_path / "out.npz"
    (stopped(out) / "job.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"job\.json .*remove .* to start over") as error:
        run_job(JOB, fake_draw, out)
    assert len(str(error.value)) < 500


def test_another_description_is_told_short(tmp_path):
    out = tmp_path / "out.npz"
    settings = {"plan": "x" * 10**5}
    (stopped(out) / "job.json").write_text(json.dumps({"settings": settings}))
    with pytest.raises(ValueError, match="batches of another job") as error:
        run_job(JOB, fake_draw, out)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


@pytest.mark.parametrize("content", [b"", b"PK\3\4", b"text" * 100])
def test_a_damaged_file_is_not_taken_for_the_job(tmp_path, content):
    out = tmp_path / "out.npz"
    out.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or of another job"):
        run_job(JOB, fake_draw, out)
    assert out.read_bytes() == content


@pytest.mark.parametrize("length", [245, 255])
def test_long_names(tmp_path, whole, length):
    out = tmp_path / ("n" * (length - 4) + ".npz")
    stopped(out)
    assert run_job(JOB, fake_draw, out)
    assert out.read_bytes() == whole
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize(
    "kills", [10, pytest.param(50, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_kills_leave_nothing_behind(tmp_path, runner, whole, kills):
    draw, ended = random.Random(1), 0
    for index in range(kills):
        out = tmp_path / f"run{index}.npz"
        number = draw.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
        code = runner(out, call="sample_slowly", after=draw.uniform(0, 0.25), number=number)
        assert code in (0, -number, 128 + number), runner.told
        ended += code != 0
        run_job(JOB, fake_draw, out)
        assert out.read_bytes() == whole
    assert sorted(os.listdir(tmp_path)) == sorted(f"run{index}.npz" for index in range(kills))
    assert ended >= kills // 4


def test_kills_at_random_points_change_nothing(tmp_path, runner):
    """At least 20 kills, spread over drawing and joining; jobs that finish start over elsewhere."""
    whole = tmp_path / "whole.npz"
    run_job(JOB, fake_draw, whole)
    draw, kills, finished = random.Random(0), 0, 0
    out = tmp_path / "run0.npz"
    while kills < 20 or not finished:
        code = runner(out, call="sample_slowly", after=draw.uniform(0, 0.15))
        kills += code == -signal.SIGKILL
        if draw.random() < 0.1:
            assert runner(out, call="sample_slowly") == 0
        if out.exists():
            assert out.read_bytes() == whole.read_bytes()
            finished += 1
            out = tmp_path / f"run{finished}.npz"
    assert runner(out, call="sample_slowly") == 0
    assert out.read_bytes() == whole.read_bytes()


def test_the_same_job_in_other_words_is_the_same():
    again = SampleJob(**json.loads(JOB.describe()))
    assert again.describe() == JOB.describe()
    assert np.array_equal(again.labels, JOB.labels)
