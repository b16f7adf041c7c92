"""Files of prompts through the command, a Ray mapper, and several devices of one process."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from sparvar_jax.cli import main
from sparvar_jax.pipelines import metadata, ray_data
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.pipelines.prompt_files import read_prompts
from sparvar_jax.pipelines.prompt_jobs import PromptJob
from tests.tiny_model import write_tiny_model

SHORT = "skip_last_scales(5)"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("prompts") / "model")


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.jsonl"
    lines = [{"prompt": "a red apple", "seed": 7}, {"prompt": "a blue owl"}, {"prompt": "a circle"}]
    file.write_text("\n".join(map(json.dumps, lines)))
    return file


def test_a_file_of_prompts(model, prompts, tmp_path, monkeypatch, capsys):
    """Three prompts in batches of two; drawn where they are missing, by command and mapper."""
    before = jax.config.values["jax_compilation_cache_dir"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    out = tmp_path / "out"
    command = ["generate", "--prompts", str(prompts), "--out", str(out), "--model", str(model)]
    command += ["--num", "2", "--plan", SHORT, "--seed", "4"]
    try:
        assert main(command) == 0
        assert f"{out}: 3 pictures drawn, 3 in the whole job" in capsys.readouterr().out
        pipe = Pipeline.from_checkpoint(model)
        texts, seeds = ["a red apple", "a blue owl"], [7, 5]
        for place, expected in enumerate(pipe(texts, plan=SHORT, seed=seeds)):
            found = out / f"{place:06d}.png"
            np.testing.assert_array_equal(np.asarray(Image.open(found)), expected)
            told = metadata.read_metadata(found)
            assert (told["prompt"], told["seed"]) == (texts[place], str(seeds[place]))
        first = (out / "000000.png").read_bytes()
        assert main(command) == 0
        assert "0 pictures drawn" in capsys.readouterr().out
        assert main([*command, "--temperature", "0.1"]) == 2
        assert "holds pictures of another job" in capsys.readouterr().err

        mapper = ray_data.PromptMapper(job_of(prompts), tmp_path, model, drawing={"plan": SHORT})
        rows = mapper({"id": np.arange(2)})
        assert rows["drawn"].tolist() == [2, 1]
        assert mapper({"id": np.arange(2)})["drawn"].tolist() == [0, 0]
        ours, theirs = (np.asarray(Image.open(x / "000000.png")) for x in (tmp_path, out))
        np.testing.assert_array_equal(ours, theirs)
        assert first == (out / "000000.png").read_bytes()
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def job_of(prompts):
    return PromptJob(read_prompts(prompts, 4), 2)


# Ray warns of its own older settings, and forks below the threads of jax.
of_ray = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:os.fork:RuntimeWarning"),
]
ON_RAY = """
import sys
import ray
from sparvar_jax.pipelines import ray_data
from sparvar_jax.pipelines.prompt_files import read_prompts
from sparvar_jax.pipelines.prompt_jobs import PromptJob

prompts, out, model, plan = sys.argv[1:]
ray.init(num_cpus=2, include_dashboard=False)
job = PromptJob(read_prompts(prompts, 4), 1)
print(ray_data.run_on_ray(job, out, model, workers=2, gpus=0, drawing={"plan": plan}))
"""


def kill_marked(mark):
    """Kill every process that began with this in its environment, whatever started it."""
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark.encode() in (folder / "environ").read_bytes().split(b"\0"):
                os.kill(int(folder.name), signal.SIGKILL)


@pytest.fixture
def ray():
    found = pytest.importorskip("ray", reason="the extra ray is not installed")
    found.init(num_cpus=2, include_dashboard=False)
    yield found
    found.shutdown()


class TestRay:
    """Two workers on a cluster of two cores, which leaves none for anything else."""

    pytestmark = of_ray

    def test_a_job(self, ray, model, prompts, tmp_path):
        arguments = {"workers": 2, "gpus": 0, "drawing": {"plan": SHORT}}
        assert ray_data.run_on_ray(job_of(prompts), tmp_path / "out", model, **arguments) == 3
        (tmp_path / "out" / "000002.png").unlink()
        assert ray_data.run_on_ray(job_of(prompts), tmp_path / "out", model, **arguments) == 1

    def test_a_job_that_was_killed_goes_on(self, model, tmp_path):
        """Driver and workers die once some pictures are there; the second run draws the others."""
        pytest.importorskip("ray", reason="the extra ray is not installed")
        prompts, out, count = tmp_path / "prompts.txt", tmp_path / "out", 60
        prompts.write_text("\n".join(f"a red apple number {n}" for n in range(count)))
        command = [sys.executable, "-c", ON_RAY, prompts, out, model, SHORT]
        mark = f"SPARVAR_TEST={tmp_path}"
        environment = os.environ | dict([mark.split("=", 1)])
        first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
        try:
            until = time.monotonic() + 200
            while not (before := sorted(out.glob("*.png"))):
                assert first.poll() is None
                assert time.monotonic() < until
                time.sleep(0.05)
        finally:
            kill_marked(mark)
            first.wait()
        before = {file: file.read_bytes() for file in sorted(out.glob("*.png"))}
        assert len(before) < count
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert int(done.stdout.split()[-1]) == count - len(before)
        assert sorted(file.name for file in out.glob("*.png")) == [
            f"{place:06d}.png" for place in range(count)
        ]
        assert all(file.read_bytes() == content for file, content in before.items())


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["a prompt"], "--prompts brings its own prompts"),
        (["--coordinator", "localhost:1"], "got None and None"),
        (["--processes", "2"], "give HOST:PORT"),
    ],
)
def test_what_makes_no_sense_beside_a_file_is_refused(prompts, tmp_path, capsys, more, told):
    assert main(["generate", "--prompts", str(prompts), "--out", str(tmp_path), *more]) == 2
    assert told in capsys.readouterr().err


def test_several_processes_need_a_file(capsys):
    assert main(["generate", "a prompt", "--processes", "2"]) == 2
    assert "give --prompts FILE" in capsys.readouterr().err


def test_info_shows_how_devices_divide_the_work(model, capsys):
    """The tiny model has two heads, and nothing of it pays to divide."""
    assert main(["info", "--model", str(model), "--devices", "2"]) == 0
    shown = capsys.readouterr().out
    assert (
        "2 devices: pictures over 1, guidance over 2, heads over 1; tokens divided nowhere" in shown
    )
    assert main(["info", "--model", str(model), "--devices", "2", "--num", "4"]) == 0
    assert "pictures over 2, guidance over 1, heads over 1" in capsys.readouterr().out
    assert main(["info", "--model", str(model), "--devices", "3"]) == 2
    expected = "2 attention heads cannot be divided over 3 devices: give one of 1, 2"
    assert expected in capsys.readouterr().err
    assert main(["info", "--model", str(model), "--devices", "some"]) == 2
    assert "devices must be a number or 'auto', got 'some'" in capsys.readouterr().err


def test_more_devices_than_there_are_are_refused(model):
    with pytest.raises(
        ValueError, match=r"devices must lie in 1\.\.1, the devices there are, got 2"
    ):
        Pipeline.from_checkpoint(model, devices=2)
    assert Pipeline.from_checkpoint(model, devices="auto").devices is None
