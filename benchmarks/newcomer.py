"""Seconds of a newcomer's path: installing, the first picture, the second, another plan, twice.

    python -m benchmarks.newcomer                      # a new environment from this checkout
    python -m benchmarks.newcomer --installed          # the environment this runs in
    python -m benchmarks.newcomer --extra cuda13

Every step is a process of its own, as somebody types it, with a compile cache that starts empty.
What pip has downloaded before is used again. Rows go to `newcomer.json`.
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import tempfile
import time
import venv
from typing import Any

from benchmarks import _record as record
from benchmarks._options import add_out, parser_of
from sparvar_jax.pipelines import metadata

ROOT = pathlib.Path(__file__).resolve().parents[1]
FIRST = "a rocket above a red apple on a dark green background"
SECOND = "a smiling cat"
OTHER_PLAN = "sparvar-fast"


def timed(command: list[Any], place: pathlib.Path) -> float:
    """Seconds of a process that runs in a folder with caches of its own; raises if it fails."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(place / "cache")}
    start = time.perf_counter()
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))} failed: {done.stderr[-500:]}")
    return time.perf_counter() - start


def install(place: pathlib.Path, extra: str | None) -> tuple[float, pathlib.Path]:
    """(seconds, folder of programs) of a new environment with the package in it."""
    start = time.perf_counter()
    venv.create(place / "env", with_pip=True)
    programs = place / "env" / ("Scripts" if os.name == "nt" else "bin")
    wanted = f"{ROOT}[{extra}]" if extra else str(ROOT)
    command = [programs / "python", "-m", "pip", "install", "--quiet", wanted]
    subprocess.run(command, cwd=place, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - start, programs


def path(place: pathlib.Path, program: list[Any], options: list[str]) -> list[dict[str, Any]]:
    """One row a picture: what was asked for and how long it took."""
    other = ["--plan", OTHER_PLAN]
    steps = (
        ("first picture", [FIRST]),
        ("second picture", [SECOND]),
        ("first with another plan", [FIRST, *other]),
        ("second with that plan", [SECOND, *other]),
    )
    rows = []
    for name, asked in steps:
        command = [*program, "generate", *asked, *options]
        rows.append(
            {
                "step": name,
                "command": " ".join(["sparvar generate", *asked, *options]),
                "seconds": timed(command, place),
            }
        )
    return rows


def main() -> None:
    """Measure and write the rows."""
    parser = parser_of(__doc__)
    parser.add_argument("--installed", action="store_true", help="install nothing")
    parser.add_argument("--extra", help="extra to install, such as cuda13")
    parser.add_argument("--size", help="0.06M, 0.25M or 0.60M: draw smaller pictures")
    parser.add_argument("--model", help="model directory or name; default the demo model")
    add_out(parser)
    asked = parser.parse_args()
    options = ["--size", asked.size] if asked.size else []
    options += ["--model", asked.model] if asked.model else []
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        # Not the script beside the interpreter: a checkout that is only on the path has none.
        place, program = pathlib.Path(folder), [sys.executable, "-m", "sparvar_jax"]
        if not asked.installed:
            seconds, programs = install(place, asked.extra)
            program = [programs / "sparvar"]
            named = f".[{asked.extra}]" if asked.extra else "."
            rows.append({"step": "install", "command": f"pip install {named}", "seconds": seconds})
        rows += path(place, program, options)
        told = metadata.read_metadata(place / "sparvar.png")["versions"]
    common = {"cores": os.cpu_count(), "load": _load()}
    entries = {"versions": versions_of(told), "rows": [{**row, **common} for row in rows]}
    record.write_entries("newcomer", entries, folder=asked.out)
    for row in rows:
        print(f"{row['step']}: {row['seconds']:.1f} s ({row['command']})")


def versions_of(told: str) -> dict[str, str]:
    """Package -> version, of the environment that drew a picture, as its metadata say."""
    return dict(entry.split(" ", 1) for entry in told.split(", "))


def _load() -> float | None:
    """Processes that wanted a core in the last quarter of an hour, where the system says it."""
    return os.getloadavg()[2] if hasattr(os, "getloadavg") else None


if __name__ == "__main__":
    main()
