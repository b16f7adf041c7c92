"""The curve of seconds against side length, dense and sparse, from `generate-sizes.json`.

    python -m benchmarks.sizes_chart h100

Writes `benchmarks/results/DEVICE/generate-sizes.png`.
"""

from __future__ import annotations

import argparse
import json
import pathlib
from typing import Any

from benchmarks._record import RESULTS


def curves(rows: list[dict[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """(side in pixels, seconds) by plan, shortest side first; failed rows are left out."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if "failed" not in row:
            found.setdefault(row["plan"], []).append((row["pixels"][0], row["seconds_median"]))
    return {plan: sorted(points) for plan, points in found.items()}


def draw(content: dict[str, Any], file: pathlib.Path) -> None:
    """The chart of one results file, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for plan, points in curves(content["rows"]).items():
        sides, seconds = zip(*points, strict=True)
        axes.plot(sides, seconds, marker="o", label=plan)
        for side, value in points:
            axes.annotate(
                f"{value:.3f}", (side, value), xytext=(4, 4), textcoords="offset points", fontsize=8
            )
    model = content["rows"][0]["model"]
    axes.set_xlabel("side of the square picture, pixels")
    axes.set_ylabel("seconds, text features to picture")
    axes.set_title(f"{model} on one {content['device']}, batch 1, guidance on")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Draw the chart of a device's results."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("device", help="folder of benchmarks/results, or a path")
    folder = RESULTS / parser.parse_args(arguments).device
    file = folder / "generate-sizes.json"
    if not file.is_file():
        raise SystemExit(f"{file} does not exist: run python -m benchmarks.generate sizes first")
    draw(json.loads(file.read_text()), file.with_suffix(".png"))


if __name__ == "__main__":
    main()
