"""Folders that others may write to, and text from files that is shown."""

import json
import os
import struct
import threading
import unicodedata

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source

from sparvar_jax.cli import main
from sparvar_jax.pipelines.sampling_jobs import parts_folder, run_job
from sparvar_jax.weights import checkpoint, files, locks
from sparvar_jax.weights.told import LONGEST, told
from tests.convert import sources
from tests.test_var_jobs import JOB, fake_draw


@pytest.fixture
def victim(tmp_path):
    file = tmp_path / "victim"
    file.write_text("precious")
    yield file
    assert file.read_text() == "precious"


@pytest.mark.parametrize("place", ["file", "nowhere"])
def test_a_lock_that_is_a_link_is_not_followed(tmp_path, released, victim, place):
    model = tmp_path / "model"
    model.mkdir()
    target = victim if place == "file" else tmp_path / "made"
    (model / ".lock").symlink_to(target)
    with pytest.raises(ValueError, match=r"cannot lock .*model/\.lock .*remove what has this name"):
        convert_source(released.transformer, model)
    assert not (tmp_path / "made").exists()
    (model / ".lock").unlink()
    os.mkfifo(model / ".lock")
    with pytest.raises(ValueError, match="no plain file"):
        convert_source(released.transformer, model)


def test_a_journal_that_is_a_link_is_not_followed(tmp_path, released, victim):
    model = tmp_path / "model"
    model.mkdir()
    (model / ".joining.json").symlink_to(victim)
    convert_source(released.transformer, model)
    assert sorted(os.listdir(model)) == ["config.json", "manifest.json", "transformer"]


@pytest.mark.parametrize("stage", ["../../victim", "/etc", "", 3])
def test_a_journal_cannot_name_other_folders(tmp_path, released, stage):
    model = tmp_path / "model"
    convert_source(released.transformer, model)
    journal = {"part": "text", "stage": stage}
    journal |= {name: {} for name in ("config", "source", "defaults", "others")}
    (model / ".joining.json").write_text(json.dumps(journal))
    with pytest.raises(ValueError, match=r"\.joining\.json is damaged: remove it"):
        convert_source(released.tokenizer, model)


def test_temporary_names_are_random_and_exclusive(tmp_path, victim, monkeypatch):
    names = set()
    for _ in range(20):
        with files.whole_file(tmp_path / "a") as temporary:
            assert temporary.stat().st_mode & 0o777 == 0o600
            names.add(temporary.name)
    assert len(names) == 20
    assert len({len(name) for name in names}) == 1
    monkeypatch.setattr("secrets.token_hex", lambda count: "0" * (2 * count))
    (tmp_path / f".sparvar-{'0' * 16}.part").symlink_to(victim)
    with (
        pytest.raises(ValueError, match=r"cannot write .*File exists"),
        files.whole_file(tmp_path / "b"),
    ):
        pass


def test_links_of_the_final_name_are_replaced_not_followed(tmp_path, victim):
    (tmp_path / "a.txt").symlink_to(victim)
    with files.whole_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("new")
    assert not (tmp_path / "a.txt").is_symlink()
    assert (tmp_path / "a.txt").read_text() == "new"


@pytest.mark.parametrize("target", ["folder", "nowhere"])
def test_parts_of_a_job_that_are_a_link_are_not_followed(tmp_path, target):
    (tmp_path / "folder").mkdir()
    out = tmp_path / "out.npz"
    parts_folder(out).symlink_to(tmp_path / target)
    with pytest.raises(ValueError, match=r"is a link or another user's|cannot write"):
        run_job(JOB, fake_draw, out)
    assert os.listdir(tmp_path / "folder") == []


@pytest.mark.parametrize("name", ["lock", "job.json", "000000.npy", "000001.npy", "whole.npz"])
def test_links_among_parts_are_not_written_through(tmp_path, victim, name):
    out = tmp_path / "out.npz"
    parts_folder(out).mkdir()
    (parts_folder(out) / name).symlink_to(victim)
    if name in ("lock", "job.json"):
        with pytest.raises(ValueError, match=name):
            run_job(JOB, fake_draw, out)
    else:
        assert run_job(JOB, fake_draw, out)


def test_parts_are_private(tmp_path):
    modes = []

    def draw(labels, seeds):
        modes.append(parts_folder(tmp_path / "out.npz").stat().st_mode & 0o777)
        return fake_draw(labels, seeds)

    run_job(JOB, draw, tmp_path / "out.npz")
    assert set(modes) == {0o700}


@pytest.mark.filterwarnings("ignore:waiting for another process")
def test_a_lock_is_held_by_one_and_leaves_nothing(tmp_path):
    inside, most, errors = [], [], []

    def work():
        try:
            for _ in range(30):
                with locks.locked(tmp_path / ".lock", wait=True):
                    inside.append(1)
                    most.append(len(inside))
                    inside.pop()
        except Exception as error:  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert max(most) == 1
    assert os.listdir(tmp_path) == []


CONTROLS = "\x1b[2J\x1b]0;title\x07 \r\n\0 \u202e gnp.exe \u200b \ud800 \x9b31m"


@pytest.mark.parametrize("length", [0, 100, 10**4, 10**7])
def test_what_is_told_is_short_and_plain(length):
    line = told(CONTROLS + "x" * length + CONTROLS + "end")
    assert len(line) <= LONGEST
    assert line.isprintable()
    assert not {unicodedata.category(letter) for letter in line} & {"Cc", "Cf", "Cs"}
    assert line.endswith("end")


def test_plain_text_is_told_as_it_is():
    assert told("ein süßer Apfel 苹果 🍎, `--plan x`") == "ein süßer Apfel 苹果 🍎, `--plan x`"


def test_names_in_files_are_shown_cut_and_escaped(tmp_path, capsys):
    """Keys of a state dict, of a safetensors file, and in an index: all come from strangers."""
    bad = "\x1b[31mred\u202e" + "k" * 10**5
    torch.save({f"{bad}{n}": torch.zeros(1) for n in range(50)}, tmp_path / "a.pth")
    torch.save({f"{bad}{n}": n for n in range(50)}, tmp_path / "b.pth")
    save_file({f"{bad}{n}": np.zeros(1) for n in range(50)}, tmp_path / "c.safetensors")
    weights = sources.infinity_weights() | {f"{bad}{n}": torch.zeros(1) for n in range(50)}
    torch.save(weights, tmp_path / "d.pth")
    header = json.dumps({bad: {"dtype": "F99", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "e.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"0000")
    for source in sorted(tmp_path.glob("?.*")):
        assert main(["convert", str(source), "--into", str(tmp_path / "model")]) == 2
        line = capsys.readouterr().err
        assert len(line) <= 500, source
        assert line.endswith("\n")
        assert line[:-1].isprintable()


def test_names_of_unknown_settings_are_cut(tmp_path):
    config = {"format": 1, "transformer": {"kind": "\x1b" * 10**5}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="kind must be a text") as error:
        checkpoint.read_config(tmp_path)
    assert len(str(error.value)) < 500
    assert str(error.value).isprintable()


def test_code_in_a_checkpoint_is_not_run(tmp_path):
    """Code beside settings that are data: the settings make nothing else acceptable."""

    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    for content in ({"a": Harm()}, {"args": np.float32(1), "a": Harm()}):
        torch.save(content, tmp_path / "bad.pth")
        with pytest.raises(ConversionError, match=r"wants to use posix\.mkdir"):
            convert_source(tmp_path / "bad.pth", tmp_path / "model")
    assert not (tmp_path / "harm").exists()
