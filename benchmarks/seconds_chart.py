"""Curves of seconds a picture, one a plan: against its side length, or against devices.

    python -m benchmarks.seconds_chart h100 generate-sizes
    python -m benchmarks.seconds_chart h100 generate-devices

Writes the PNG beside the JSON file of that name in `benchmarks/results/DEVICE`.
"""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator
from typing import Any

from benchmarks._options import parser_of
from benchmarks._record import RESULTS

Point = tuple[int, float, str]
"""Where on the axis, seconds, and what is written there."""
AXES = {
    "generate-sizes": ("side of the square picture, pixels", "one {device}, guidance on"),
    "generate-devices": (
        "devices of one host (mesh: pictures x heads, or pictures x guidance x heads)",
        "{device}, one picture, guidance on",
    ),
}
"""File -> label of its horizontal axis, and what its title says."""


def curves(name: str, rows: list[dict[str, Any]]) -> dict[str, list[Point]]:
    """Points by plan and form of matrices, in order.

    Failed rows, and those of more than one picture, are left out.
    """
    found: dict[str, dict[int, Point]] = {}
    for row in rows:
        if "failed" in row or row.get("pictures", 1) != 1:
            continue
        form = f", {row['matrices']}" if "matrices" in row else ""
        points = found.setdefault(row["plan"] + form, {})
        for point in _points(name, row):
            points.setdefault(point[0], point)
    return {plan: sorted(points.values()) for plan, points in found.items()}


def _points(name: str, row: dict[str, Any]) -> Iterator[Point]:
    seconds = row["seconds_median"]
    if name == "generate-sizes":
        yield row["pixels"][0], seconds, f"{seconds:.3f}"
        return
    alone = row["one_device"]["seconds_median"]
    yield 1, alone, f"{alone:.3f}"
    yield row["devices"], seconds, f"{seconds:.3f} ({row['mesh']})"


def draw(name: str, content: dict[str, Any], file: pathlib.Path) -> None:
    """The chart of one results file, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for plan, points in curves(name, content["rows"]).items():
        places, seconds, told = zip(*points, strict=True)
        axes.plot(places, seconds, marker="o", label=plan)
        for place, value, text in zip(places, seconds, told, strict=True):
            axes.annotate(
                text, (place, value), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    label, title = AXES[name]
    axes.set_xlabel(label, fontsize=9)
    axes.set_ylabel("seconds, text features to picture")
    axes.set_title(f"{content['rows'][0]['model']}, {title.format(device=content['device'])}")
    axes.set_ylim(bottom=0)
    if name == "generate-devices":
        axes.set_xticks(sorted({place for line in axes.lines for place in line.get_xdata()}))
        axes.set_xlim(0.8, axes.get_xlim()[1] + 0.5)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Draw the chart of a device's results."""
    parser = parser_of(__doc__)
    parser.add_argument("device", help="folder of benchmarks/results, or a path")
    parser.add_argument("name", choices=AXES)
    asked = parser.parse_args(arguments)
    file = RESULTS / asked.device / f"{asked.name}.json"
    if not file.is_file():
        raise SystemExit(f"{file} does not exist: run its benchmark first")
    draw(asked.name, json.loads(file.read_text()), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
