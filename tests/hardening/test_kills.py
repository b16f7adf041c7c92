"""Whatever ends a conversion, the next run leaves a whole model directory and nothing else."""

import json
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from sparvar_jax.weights import checkpoint
from tests.hardening import workers
from tests.hardening.runs import Runner, leftovers, torn
from tests.tiny_model import write_tiny_model

SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)


def convert_all(runner, released, model):
    """Convert what is missing; both parts are there afterwards."""
    for source in (released.transformer, released.tokenizer):
        code = runner("convert", source, "--into", model)
        assert code == 0 or (code == 2 and "exists already" in runner.told), runner.told
    assert {"transformer", "tokenizer"} <= set(checkpoint.read_config(model))


@pytest.mark.parametrize(
    "kills", [6, pytest.param(100, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_random_kills_of_convert(tmp_path, runner, released, kills):
    draw, ended = random.Random(0), []
    start = time.perf_counter()
    convert_all(runner, released, tmp_path / "timed")
    longest = (time.perf_counter() - start) / 2
    for index in range(kills):
        model, number = tmp_path / f"model{index}", draw.choice(SIGNALS)
        source = draw.choice([released.transformer, released.tokenizer])
        after = draw.uniform(0, longest)
        ended.append(runner("convert", source, "--into", model, after=after, number=number))
        assert ended[-1] in (0, -number, 128 + number), runner.told
        if ended[-1] > 0 and model.exists():  # stopped, and given the time to clean up
            assert leftovers(model) == []
        if kills > 10:
            convert_all(runner, released, model)
        else:
            code = runner("convert", source, "--into", model)
            assert code == 0 or (code == 2 and "exists already" in runner.told), runner.told
        assert torn(model) == []
        assert leftovers(model) == []
    assert len([code for code in ended if code]) >= kills // 2, ended


@pytest.mark.parametrize("again", ["same", "other"])
@pytest.mark.parametrize("stride", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_every_step_of_joining(tmp_path, runner, released, again, stride):
    """Every renaming, removal and new folder of a part's way into the directory."""
    source = released.transformer
    other = released.transformer if again == "same" else released.tokenizer
    for step in range(again == "other", 60, stride):
        model = tmp_path / f"model{step}"
        code = runner("convert", source, "--into", model, step=step)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        code = runner("convert", other, "--into", model)
        assert code == 0 or "exists already" in runner.told, runner.told
        assert torn(model) == []
        assert leftovers(model) == []
    assert 8 <= step < 50


@pytest.mark.parametrize(
    "kills", [10, pytest.param(40, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_kills_while_pictures_are_written(tmp_path, runner, kills):
    """What `generate` and `edit` write with: the next call removes what a kill left."""
    draw, ended = random.Random(3), 0
    for _ in range(kills):
        number = draw.choice(SIGNALS)
        code = runner(tmp_path, call="write_pictures", after=draw.uniform(0, 0.15), number=number)
        assert code in (0, -number, 128 + number), runner.told
        ended += code != 0
    assert ended >= kills // 3
    workers.write_pictures(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.png", "1.png"]
    assert {path.read_bytes() for path in tmp_path.iterdir()} == {b"whole"}


@pytest.mark.slow
def test_kills_of_generate(tmp_path, runner, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = write_tiny_model(tmp_path / "model")
    (tmp_path / "out").mkdir()
    line = ["generate", "x", "--model", model, "--num", 2, "--plan", "skip_last_scales(5)"]
    line += ["--out", tmp_path / "out" / "a.png"]
    assert runner(*line) == 0, runner.told
    start = time.perf_counter()
    assert runner(*line) == 0
    longest, draw, ended = time.perf_counter() - start, random.Random(4), []
    whole = [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())]
    for _ in range(20):
        number = draw.choice(SIGNALS)
        ended.append(runner(*line, after=draw.uniform(0, longest), number=number))
        assert ended[-1] in (0, -number, 128 + number), runner.told
    assert len([code for code in ended if code]) >= 8, ended
    assert runner(*line) == 0
    assert [path.read_bytes() for path in sorted((tmp_path / "out").iterdir())] == whole


def test_sigterm_cleans_up_like_an_interrupt(tmp_path, runner, released):
    model, found = tmp_path / "model", []
    for wait in range(40):  # until one strikes while the command works
        code = runner(
            "convert", released.transformer, "--into", model, after=0.02 * wait, number=15
        )
        found.append(code)
        if code == 143:
            break
        assert code in (-15, 0)
    assert found[-1] == 143, found
    assert "error: stopped by SIGTERM" in runner.told
    assert not model.exists() or leftovers(model) == []


@pytest.mark.parametrize("name", ["back.pth", "back.safetensors"])
def test_kills_of_an_export_leave_nothing_behind(tmp_path, runner, released, name):
    model, place = tmp_path / "model", tmp_path / "place"
    place.mkdir()
    convert_all(runner, released, model)
    start, draw, ended = time.perf_counter(), random.Random(2), []
    assert runner("convert", model, "--export", place / name) == 0
    longest, whole = time.perf_counter() - start, (place / name).read_bytes()
    for _ in range(4):
        after = draw.uniform(0, longest)
        ended.append(runner("convert", model, "--export", place / name, after=after))
    ended.append(runner("convert", model, "--export", place / name, step=1))
    assert any(ended)
    assert runner("convert", model, "--export", place / name) == 0
    assert [file.name for file in place.iterdir()] == [name]
    assert (place / name).read_bytes() == whole


def test_what_an_earlier_version_left_is_removed_and_replaced(tmp_path, runner, released):
    model = tmp_path / "model"
    convert_all(runner, released, model)
    config = checkpoint.read_config(model)
    (model / ".transformer-x1_abcde" / "transformer").mkdir(parents=True)
    del config["transformer"]
    (model / checkpoint.CONFIG).write_text(json.dumps(config))
    assert runner("convert", released.transformer, "--into", model) == 0
    assert torn(model) == leftovers(model) == []


def test_a_part_whose_folder_is_lost_is_converted_again(tmp_path, runner, released):
    model = tmp_path / "model"
    convert_all(runner, released, model)
    shutil.rmtree(model / "tokenizer")
    assert runner("convert", released.tokenizer, "--into", model) == 0
    assert torn(model) == leftovers(model) == []


def test_a_folder_that_convert_did_not_write_is_not_replaced(tmp_path, runner, released):
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "thesis.txt").write_text("all of it")
    assert runner("convert", released.transformer, "--into", tmp_path) == 2
    assert "exists already" in runner.told
    assert (tmp_path / "transformer" / "thesis.txt").read_text() == "all of it"


def test_two_processes_into_one_folder(tmp_path, runner, released):
    (tmp_path / "second").mkdir()
    second = Runner(tmp_path / "second")
    for index in range(2):
        model = tmp_path / f"model{index}"
        calls = [(runner, released.transformer), (second, released.tokenizer)]
        with ThreadPoolExecutor() as pool:
            jobs = [pool.submit(run, "convert", source, "--into", model) for run, source in calls]
        assert [job.result() for job in jobs] == [0, 0], [run.told for run, _ in calls]
        assert {"transformer", "tokenizer"} <= set(checkpoint.read_config(model))
        assert torn(model) == leftovers(model) == []
    second.close()
