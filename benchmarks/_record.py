"""Result files under `benchmarks/results/`: device, versions, date, commit and rows."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import os
import pathlib
import re
import subprocess
from typing import Any

import jax

RESULTS = pathlib.Path(__file__).resolve().parent / "results"
MUST_AGREE = ("device", "versions", "xla_flags")
"""What rows of one file have in common."""
PACKAGES = ("jax", "jaxlib", "flax", "torch", "flash-attn3-jax")


def device_name() -> str:
    """What the first device calls itself, for instance "NVIDIA H100 80GB HBM3" or "cpu"."""
    return jax.devices()[0].device_kind


def device_folder() -> str:
    """The device as a short folder name: h100, h200, cpu, ..."""
    name = device_name().lower()
    known = re.search(r"[abhv]\d{2,3}", name)
    return known[0] if known else re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def versions() -> dict[str, str]:
    """Installed versions of the packages that matter to a figure."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The commit measured: SPARVAR_COMMIT if set (a tree without its history), else from git."""
    if named := os.environ.get("SPARVAR_COMMIT"):
        return named
    command = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(
            command, cwd=RESULTS.parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return done.stdout.strip()


def describe() -> dict[str, Any]:
    """What a figure belongs to: device, versions, date, commit, and XLA flags that were set."""
    return {
        "device": device_name(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def write(
    name: str, rows: list[dict[str, Any]], *, folder: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Write one results file of rows; returns its path."""
    return write_entries(name, {"rows": rows}, folder=folder)


def write_entries(
    name: str, entries: dict[str, Any], *, folder: str | pathlib.Path | None = None
) -> pathlib.Path:
    """Write one results file under a temporary name, then rename it; returns its path.

    entries: what the file holds behind what it belongs to (`describe`).
    """
    file = _path(name, folder)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".json.new")
    temporary.write_text(json.dumps({**describe(), **entries}, indent=1) + "\n")
    os.replace(temporary, file)
    return file


def add(
    name: str, row: dict[str, Any], *, key: tuple[str, ...], folder: str | None = None
) -> pathlib.Path:
    """Write one row into a results file, in place of the row with the same values of `key`.

    The row says which commit it was measured at, because other rows stay, unless another device,
    version or flag made them.
    """
    file, header, rows = _path(name, folder), describe(), []
    row = row | {"commit": header["commit"]}
    if file.is_file():
        before = json.loads(file.read_text())
        if all(before.get(entry) == header[entry] for entry in MUST_AGREE):
            rows = [{"commit": before["commit"]} | old for old in before["rows"]]
    replaced = [tuple(old.get(k) for k in key) for old in rows]
    wanted = tuple(row.get(k) for k in key)
    if wanted in replaced:
        rows[replaced.index(wanted)] = row
    else:
        rows.append(row)
    return write(name, rows, folder=folder)


def _path(name: str, folder: str | pathlib.Path | None) -> pathlib.Path:
    return (pathlib.Path(folder) if folder else RESULTS / device_folder()) / f"{name}.json"
