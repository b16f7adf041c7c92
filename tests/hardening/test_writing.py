"""Files that get their names last: on the disk before, of any length, several at once."""

import os
import subprocess
import sys

import pytest

from sparvar_jax.weights import files
from sparvar_jax.weights.large_file import large_file, whole_files


@pytest.fixture
def order(monkeypatch):
    """What is synced and what gets its name, in order, by inode."""
    seen, fsync, replace = [], os.fsync, os.replace

    def synced(handle):
        seen.append(("sync", os.fstat(handle).st_ino))
        fsync(handle)

    def named(source, target):
        seen.append(("name", os.stat(source).st_ino))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    return seen


def one_file(path):
    with files.whole_file(path) as temporary:
        temporary.write_text("all of it")


def one_large_file(path):
    with large_file(path) as temporary:
        temporary.write_text("all of it")


def two_files(path):
    with whole_files([path, path.with_name("b")]) as temporaries:
        for temporary in temporaries:
            temporary.write_text("all of it")


@pytest.mark.parametrize("write", [one_file, one_large_file, two_files])
def test_files_are_on_the_disk_before_they_have_their_names(tmp_path, order, write):
    write(tmp_path / "a")
    inode, folder = (tmp_path / "a").stat().st_ino, tmp_path.stat().st_ino
    named = order.index(("name", inode))
    assert order.index(("sync", inode)) < named
    assert ("sync", folder) in order[named:]
    assert {path.read_text() for path in tmp_path.iterdir()} == {"all of it"}


def test_folders_are_on_the_disk_before_they_have_their_names(tmp_path, order):
    built = tmp_path / "built"
    (built / "inner").mkdir(parents=True)
    (built / "inner" / "a").write_text("x")
    files.replace_folder(built, tmp_path / "part")
    (named,) = [place for place, (what, _) in enumerate(order) if what == "name"]
    wanted = {path.stat().st_ino for path in (tmp_path / "part").rglob("*")}
    assert wanted <= {inode for what, inode in order[:named] if what == "sync"}


@pytest.mark.parametrize("length", [245, 255])
def test_pictures_may_have_long_names(tmp_path, length):
    paths = [tmp_path / (letter * (length - 4) + ".png") for letter in "ab"]
    with whole_files(paths) as temporaries:
        for temporary in temporaries:
            temporary.write_bytes(b"whole")
    assert sorted(tmp_path.iterdir()) == paths
    too_long = tmp_path / ("c" * 252 + ".png")
    with pytest.raises(ValueError, match="File name too long"), whole_files([too_long]):
        pass


def stopped(folder):
    with whole_files([folder / "a", folder / "b"]) as temporaries:
        temporaries[0].write_text("new")
        raise KeyError


def test_a_failure_leaves_the_old_files_and_nothing_else(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(KeyError):
        stopped(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_is_in_use_is_not_taken_for_a_dead_ones(tmp_path):
    with whole_files([tmp_path / "a"]) as (first,):
        with whole_files([tmp_path / "b"]) as (second,):
            second.write_text("second")
        first.write_text("first")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "a": "first",
        "b": "second",
    }


def test_a_users_own_files_do_not_run_in_place_of_ours(tmp_path):
    """Names of modules that a user's folder may well hold."""
    names = ("convert", "plans", "policies", "models", "weights", "runtime", "pipelines", "study")
    for name in names:
        (tmp_path / f"{name}.py").write_text("open('ran', 'w')\nraise SystemExit(9)\n")
    command = [sys.executable, "-m", "sparvar_jax", "convert", "none.pth", "--into", "model"]
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert done.returncode == 2, done.stderr
    assert "none.pth does not exist" in done.stderr
    assert sorted(file.name for file in tmp_path.iterdir() if file.is_file()) == [
        f"{name}.py" for name in sorted(names)
    ]
