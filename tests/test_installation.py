"""What is installed: the wheel and its content, and advice where a GPU stands idle."""

import email
import pathlib
import re
import subprocess
import sys
import venv
import zipfile

import jax
import pytest

from sparvar_jax.runtime import unused_gpu

ROOT = pathlib.Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package as people install it, built by the standard front end."""
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    subprocess.run([*command, str(ROOT)], check=True, capture_output=True)
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_the_packages_and_the_demo_model_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        info = next(name for name in names if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_string(archive.read(info).decode())
        entries = archive.read(info.replace("METADATA", "entry_points.txt")).decode()
    tops = {name.split("/")[0] for name in names}
    known = {"sparvar_jax", "pallas_kernels", "sparvar_convert"}
    assert tops - known == {info.split("/")[0]}
    for folder in known:
        inside = {name.removeprefix("convert/") for name in _tracked(folder)}
        assert inside <= set(names)
    assert "sparvar_jax/demo/transformer/weights.safetensors" in names
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]
    assert "sparvar = sparvar_jax.cli:main" in entries
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"


def _tracked(package):
    base = ROOT / "convert" / package if package == "sparvar_convert" else ROOT / package
    return [str(file.relative_to(ROOT)) for file in base.rglob("*.py")]


def test_twine_finds_nothing_wrong_with_the_wheel(wheel):
    pytest.importorskip("twine")
    command = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_the_gpu_extra_asks_for_nothing_where_there_is_nothing(wheel):
    from packaging.requirements import Requirement

    with zipfile.ZipFile(wheel) as archive:
        info = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = email.message_from_string(archive.read(info).decode())
    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist")]
    for python, expected in (("3.11", []), ("3.12", ["jax[cuda13]>=0.11"]), ("3.13", 1)):
        place = {"python_version": python, "extra": "cuda13"}
        found = [r for r in requirements if r.marker and "cuda13" in str(r.marker)]
        found = [r for r in found if r.marker and r.marker.evaluate(place)]
        texts = [str(r).partition(";")[0].strip() for r in found]
        assert texts == expected if isinstance(expected, list) else len(texts) == expected


@pytest.mark.parametrize(
    ("python", "message"),
    [((3, 11), r"Python 3\.11 there is jax 0\.10 alone"), ((3, 12), "JAX_PLATFORMS=cpu")],
)
def test_an_idle_gpu_is_told_with_what_to_install(tmp_path, python, message):
    if jax.default_backend() != "cpu":
        pytest.skip("jax uses an accelerator here")
    assert unused_gpu.advice(tmp_path / "none", python) is None
    assert unused_gpu.advice(tmp_path, python) is None
    (tmp_path / "0000:01:00.0").mkdir()
    told = unused_gpu.advice(tmp_path, python)
    assert told is not None
    assert re.search(message, told)
    assert "sparvar-jax[cuda13]" in told
    assert unused_gpu.advice(tmp_path, python, "cpu") is None


@pytest.mark.slow
def test_a_new_environment_with_the_wheel_draws_and_measures(wheel, tmp_path):
    venv.create(tmp_path / "env", with_pip=True)
    here = tmp_path / "env" / "bin"
    subprocess.run([here / "pip", "install", "--quiet", str(wheel)], check=True)

    def sparvar(*arguments):
        command = [here / "sparvar", *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    prompt = "a rocket above a red apple on a dark green background"
    assert "rocket.png: 256x256" in sparvar("generate", prompt, "--out", "rocket.png")
    assert (tmp_path / "rocket.png").stat().st_size > 10_000
    assert "sparvar-fast" in sparvar("bench", "--quick", "--out", "bench.html")
    assert "<table>" in (tmp_path / "bench.html").read_text()
