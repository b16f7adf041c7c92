"""Turns the JSON files under `benchmarks/results/` into the README's tables.

    python -m benchmarks.report            # rewrite the tables
    python -m benchmarks.report --check    # exit 1 if the README is not what the files say

A table lives between `<!-- table: NAME -->` and `<!-- end -->`; NAME is a file's path below
`benchmarks/results/` without its ending, and the columns follow from the kind of file.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"
_TABLE = re.compile(r"<!-- table: ([\w./-]+) -->\n.*?<!-- end -->", re.DOTALL)

Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]


def _number(name: str, digits: int = 3, factor: float = 1.0) -> Callable[[Row], str]:
    def show(row: Row) -> str:
        value = row.get(name)
        return "" if value is None else f"{factor * value:.{digits}f}"

    return show


def _text(name: str) -> Callable[[Row], str]:
    return lambda row: str(row.get(name, ""))


def _parts(row: Row) -> str:
    parts = row.get("seconds_by_part", {})
    return ", ".join(f"{name} {1000 * seconds:.0f} ms" for name, seconds in parts.items())


COLUMNS: dict[str, tuple[Column, ...]] = {
    "kernels": (
        ("case", _text("case")),
        ("implementation", _text("implementation")),
        ("rows", _text("batch_rows")),
        ("ms", _number("median_ms")),
        ("spread", _number("spread_ms")),
        ("density", _number("density")),
        ("TFLOP/s kept", _number("tflops_kept", 0)),
    ),
    "convert": (
        ("checkpoint", _text("preset")),
        ("form", _text("form")),
        ("parameters, billion", _number("parameters_b", 2)),
        ("largest file GiB", _number("largest_file_gib", 2)),
        ("peak memory GiB", _number("peak_gib", 2)),
        ("bound GiB", _number("bound_gib", 2)),
        ("seconds", _number("seconds", 0)),
    ),
    "fused": (
        ("case", _text("case")),
        ("implementation", _text("implementation")),
        ("ms", _number("median_ms", 4)),
        ("spread", _number("spread_ms", 4)),
        ("GB/s", _number("gb_per_s", 0)),
        ("difference", _number("error", 5)),
    ),
    "generate": (
        ("model", _text("model")),
        ("plan", _text("plan")),
        ("images", _text("batch")),
        ("size", _text("size")),
        ("seconds", _number("seconds_median")),
        ("spread", _number("seconds_spread")),
        ("parts (each waited for)", _parts),
        ("density", _number("density")),
        ("cold s", _number("cold_seconds", 1)),
        ("peak GiB", _number("peak_gib", 1)),
    ),
    "quality": (
        ("plan", _text("plan")),
        ("subset", _text("subset")),
        ("PSNR dB", _number("psnr", 2)),
        ("SSIM", _number("ssim")),
        ("MS-SSIM", _number("ms_ssim")),
        ("distance", _number("distance")),
        ("bits equal", _number("bit_agreement")),
        ("density", _number("density")),
        ("density, all scales", _number("density_all")),
    ),
}


def table(name: str) -> str:
    """The markdown table of one results file, with the line that says where it comes from."""
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"the README names {file}, which does not exist: run its benchmark first")
    content = json.loads(file.read_text())
    kind = re.split(r"[-_.]", file.stem)[0]
    if kind not in COLUMNS:
        raise ValueError(f"{file}: no table for {kind!r}, expected one of {', '.join(COLUMNS)}")
    columns = COLUMNS[kind]
    lines = [
        "| " + " | ".join(title for title, _ in columns) + " |",
        "| " + " | ".join("---" for _ in columns) + " |",
    ]
    lines += ["| " + " | ".join(show(row) for _, show in columns) + " |" for row in content["rows"]]
    versions = ", ".join(f"{k} {v}" for k, v in content["versions"].items())
    source = f"`benchmarks/results/{name}.json`: {content['device']}; {versions}"
    return "\n".join([*lines, "", f"{source}; {content['date']}; commit {content['commit'][:12]}."])


def render(readme: str) -> str:
    """The README with every table rewritten from its file."""
    return _TABLE.sub(lambda m: f"<!-- table: {m[1]} -->\n{table(m[1])}\n<!-- end -->", readme)


def main() -> None:
    """Rewrite or check the README's tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    before = README.read_text()
    after = render(before)
    if arguments.check and after != before:
        sys.exit("README.md is older than benchmarks/results: run python -m benchmarks.report")
    if not arguments.check:
        README.write_text(after)


if __name__ == "__main__":
    main()
