"""Everything that reads what others wrote, each with the damage it must take: done, or refused.

A target's case is plain data (numbers and text), so that a failure can be printed as a test.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
from sparvar_convert import run as convert_run

from sparvar_jax.cli import console, main
from sparvar_jax.models import text_tokens
from sparvar_jax.pipelines import loading, pictures, sample_parts, sampling_jobs
from sparvar_jax.pipelines.numbers import image_keys, parse_ratio
from sparvar_jax.pipelines.requests import Options
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime.controls import controls
from sparvar_jax.weights import storage
from sparvar_jax.weights.json_file import read_json
from tests.fuzz import canary, mutations, seeds, texts

LONGEST = 500
SMALL_PLANS = infinity_schedule(1.0, "0.06M")


class Fault(Exception):
    """What a user must not meet."""


@dataclasses.dataclass(frozen=True)
class Target:
    """cases: what is tried. run: reads a case in an empty folder; ValueError refuses it."""

    cases: st.SearchStrategy
    run: Callable[[Any, Path], object]


def check(name: str, case: Any) -> str | None:
    """Run one case of a target: the line that refused it, None where it was read; else raises."""
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    canary.watch()
    try:
        with (
            warnings.catch_warnings(),
            canary.listening(),
            contextlib.redirect_stdout(io.StringIO()),
        ):
            warnings.simplefilter("ignore")  # commands turn them into lines
            refused = TARGETS[name].run(case, folder)
            return refused if isinstance(refused, str) else None
    except Exception as error:
        foreseen = console.describe(error)
        if foreseen is None or isinstance(error, Fault | canary.Ran | UnicodeError):
            raise
        if "does not fit into memory" in foreseen[0]:
            raise Fault(f"a small file asked for much memory: {foreseen[0]}") from error
        return foreseen[0]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _steps(count: int) -> st.SearchStrategy:
    """(which seed, steps of damage)."""
    value = st.sampled_from(
        [
            "",
            "00",
            "ff",
            "80",
            "7f",
            "2e",
            "0a",
            "28",
            "52",
            "62",
            "63",
            "ffff",
            "00000001",
            "ffffffff",
            b"4294967295".hex(),
            "deadbeef00",
        ]
    )
    step = st.tuples(st.integers(0, 63), st.integers(0, 2**24 - 1), value)
    return st.tuples(st.integers(0, count - 1), st.lists(step, min_size=1, max_size=5))


def _damaged(contents: tuple[bytes, ...], case: Any, structure: mutations.Mutate) -> bytes:
    return mutations.mutated(contents[case[0] % len(contents)], case[1], structure)


class _Nothing:
    """In place of what writes tensors: the files are read whole, and nothing is stored."""

    def __init__(self, folder: Path):
        folder.mkdir(exist_ok=True)

    def write(self, path: str, array: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def _convert(source: Path, into: Path) -> None:
    writer, convert_run._Writer = convert_run._Writer, _Nothing
    try:
        convert_run.convert_source(source, into)
    finally:
        convert_run._Writer = writer
        left = {path.name for path in into.glob("*")}
        left -= {"transformer", "tokenizer", "text", "config.json", "manifest.json"}
        if left:
            raise Fault(f"left behind: {left}")


def _pth(case: Any, folder: Path) -> None:
    contents = seeds.torch_files()
    zipped = contents[case[0] % len(contents)].startswith(b"PK")
    structure = mutations.on_zip if zipped else mutations.on_pickle
    (folder / "a.pth").write_bytes(_damaged(contents, case, structure))
    _convert(folder / "a.pth", folder / "model")


def _safetensors(case: Any, folder: Path) -> None:
    content = _damaged(seeds.safetensors_files(), case, mutations.on_safetensors)
    (folder / "a.safetensors").write_bytes(content)
    _convert(folder / "a.safetensors", folder / "model")


def _shards(case: Any, folder: Path) -> None:
    files, source = dict(seeds.shards()), folder / "source"
    name = sorted(files)[-1 if case[0] % 3 else 0]
    structure = mutations.on_json if name.endswith(".json") else mutations.on_safetensors
    files[name] = mutations.mutated(files[name], case[1], structure)
    source.mkdir()
    for other, content in files.items():
        (source / other).write_bytes(content)
    _convert(source, folder / "model")


def _model(case: Any, folder: Path) -> str | None:
    files = seeds.model()
    name = ("config.json", "manifest.json")[case[0] % 2]
    for other, content in files.items():
        (folder / other).parent.mkdir(exist_ok=True)
        (folder / other).write_bytes(content)
    (folder / name).write_bytes(_damaged((files[name],), case, mutations.on_json))
    return _command(["info", "--model", str(folder), "--size", "0.06M"])


def _part(case: Any, folder: Path) -> None:
    names = [name for name in seeds.model() if name.endswith(".safetensors")]
    contents = tuple(seeds.model()[name] for name in names)
    damaged = _damaged(contents, case, mutations.on_safetensors)
    (folder / storage.SAFETENSORS).write_bytes(damaged)
    storage.PartReader(folder).restore()


def _tokenizer(case: Any, folder: Path) -> None:
    contents = (seeds.model()["text/spiece.model"], seeds.tokenizer_json())
    name = ("spiece.model", "tokenizer.json")[case[0] % 2]
    (folder / name).write_bytes(_damaged(contents, case, mutations.on_json))
    found = text_tokens.open_tokenizer(folder / name)
    found.encode(["a red apple"])


def _picture(case: Any, folder: Path) -> None:
    (folder / "a").write_bytes(_damaged(seeds.pictures(), case, mutations.on_png))
    read = pictures.read_mask if case[0] % 3 == 2 else pictures.read_picture
    read(folder / "a", 24)


def _samples(case: Any, folder: Path) -> None:
    contents = seeds.job_files()
    which = case[0] % 3
    structure = (mutations.on_zip, mutations.on_bytes, mutations.on_json)[which]
    damaged = mutations.mutated(contents[which], case[1], structure)
    if which == 0:
        (folder / "a.npz").write_bytes(damaged)
        sampling_jobs.run_job(seeds.JOB, _draw, folder / "a.npz")
    elif which == 1:
        (folder / "000000.npy").write_bytes(damaged)
        sample_parts.load(folder, 0, 2)
    else:
        (folder / "job.json").write_bytes(damaged)
        read_json(folder / "job.json", "start over")


def _draw(labels: Any, seeds_: Any) -> Any:
    del seeds_
    return np.zeros((len(labels), 4, 4, 3), np.uint8)


def _plan(case: str, folder: Path) -> None:
    del folder
    parse_plan(case, SMALL_PLANS, 3).describe()


def _line(case: list[str], folder: Path) -> str | None:
    with contextlib.chdir(folder):
        return _command([word.replace("HERE", str(folder)) for word in case])


def _command(words: list[str]) -> str | None:
    """A command's error line; its exit code, and what it tells, are what is documented."""
    told = io.StringIO()
    with contextlib.redirect_stderr(told):
        code = main(words)
    lines = told.getvalue().splitlines()
    wrong = [line for line in lines if len(line) > LONGEST or not line.isprintable()]
    errors = [line for line in lines if line.startswith("error: ")]
    if code not in (0, 1, 2) or wrong or len(errors) != (code != 0) or len(lines) > 4:
        raise Fault(f"exit code {code}, {len(lines)} lines: {told.getvalue()[:300]!r}")
    return errors[0] if errors else None


def _call(case: tuple[str, Any], folder: Path) -> None:
    del folder
    name, value = case
    described = _described()
    if name == "seed":
        image_keys(value, 2)
    elif name == "ratio":
        parse_ratio(value)
    elif name in ("guidance", "temperature", "top_p", "top_k"):
        controls(3, **{name: value})
        if name != "top_k":
            Options(**{name: value}).resolve(described)
    else:
        Options(**{name: value}).resolve(described)


def _described() -> Any:
    if "model" not in _kept:
        with tempfile.TemporaryDirectory() as folder:
            for name, content in seeds.model().items():
                (Path(folder) / name).parent.mkdir(exist_ok=True)
                (Path(folder) / name).write_bytes(content)
            _kept["model"] = loading.describe_model(Path(folder))
    return _kept["model"]


_kept: dict[str, Any] = {}

TARGETS: dict[str, Target] = {
    "pth": Target(_steps(6), _pth),
    "safetensors": Target(_steps(3), _safetensors),
    "shards": Target(_steps(3), _shards),
    "model": Target(_steps(2), _model),
    "part": Target(_steps(3), _part),
    "tokenizer": Target(_steps(2), _tokenizer),
    "picture": Target(_steps(75), _picture),
    "samples": Target(_steps(3), _samples),
    "plan": Target(texts.plans(), _plan),
    "line": Target(texts.lines(), _line),
    "call": Target(texts.calls(), _call),
}
