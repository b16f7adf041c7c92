"""What a chart of plans says: the frontier, which plan to take, table, picture and files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparvar_jax.study.chart import DENSE, FLOOR, Row
from sparvar_jax.weights.files import whole_file
from sparvar_jax.weights.json_file import read_json

CLASSES = {"almost lossless": 0.95, "balanced": 0.85, "fastest": 0.6}
"""Smallest mean SSIM to the dense pictures of the plan that is named for a wish."""
ROOM = 5.0
"""Decibels above the nearest plan where a noise floor that lies higher is drawn."""
COLUMNS = (
    ("PSNR dB", "psnr", 2),
    ("SSIM", "ssim", 3),
    ("MS-SSIM", "ms_ssim", 3),
    ("distance", "distance", 3),
    ("bits equal", "bits_equal", 3),
    ("seconds a picture", "seconds", 3),
    ("cache MiB", "cache_mib", 1),
    ("peak MiB", "peak_mib", 0),
    ("tokens x rows", "work", 3),
    ("density", "density", 3),
)


def label(plan: str) -> str:
    """A plan as the table names it."""
    return "dense, other kernels (noise floor)" if plan == FLOOR else plan


def frontier(rows: Sequence[Row]) -> list[Row]:
    """Plans that no other beats in both seconds and PSNR, fastest first; dense and floor apart."""
    found: list[Row] = []
    drawn = [row for row in rows if row.get("psnr") is not None and row["plan"] != FLOOR]
    for row in sorted(drawn, key=lambda row: (row["seconds"], -row["psnr"])):
        if not found or row["psnr"] > found[-1]["psnr"]:
            found.append(row)
    return found


def chosen(rows: Sequence[Row]) -> dict[str, str]:
    """For every wish the fastest plan whose pictures are near enough; dense where none is."""
    candidates = frontier(rows)
    return {
        wish: next((row["plan"] for row in candidates if row["ssim"] >= least), DENSE)
        for wish, least in CLASSES.items()
    }


def sentence(rows: Sequence[Row]) -> str:
    """Which plan to take."""
    parts = [f"{plan} for {wish!r}" for wish, plan in chosen(rows).items()]
    return f"Take {', '.join(parts[:-1])} and {parts[-1]}."


def table(rows: Sequence[Row]) -> str:
    """All rows in markdown; plans on the frontier are marked with a star."""
    best = [row["plan"] for row in frontier(rows)]
    lines = [f"| plan | {' | '.join(title for title, _, _ in COLUMNS)} |"]
    lines.append("| --- |" + " --- |" * len(COLUMNS))
    for row in rows:
        if "failed" in row:
            lines.append(f"| {label(row['plan'])} | {row['failed']} |" + " |" * (len(COLUMNS) - 1))
            continue
        cells = [_cell(row.get(name), digits) for _, name, digits in COLUMNS]
        star = " *" if row["plan"] in best else ""
        lines.append(f"| {label(row['plan'])}{star} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _cell(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def draw(rows: Sequence[Row], file: Path, title: str) -> None:
    """PSNR against seconds as PNG, with the frontier and the noise floor; needs matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(10, 6.5))
    best = frontier(rows)
    points: dict[tuple[float, float], list[str]] = {}
    for row in rows:
        if row.get("psnr") is not None and row["plan"] != FLOOR:
            points.setdefault((row["seconds"], row["psnr"]), []).append(row["plan"])
    on = {(row["seconds"], row["psnr"]) for row in best}
    for point, names in points.items():
        axes.scatter(*point, color="tab:red" if point in on else "tab:blue")
        axes.annotate(
            "\n".join(names), point, fontsize=6.5, xytext=(4, 2), textcoords="offset points"
        )
    axes.plot([r["seconds"] for r in best], [r["psnr"] for r in best], color="tab:red", alpha=0.5)
    top = max((psnr for _, psnr in points), default=0.0) + ROOM
    for row in rows:
        if row["plan"] == FLOOR and row.get("psnr") is not None:
            said = f"{label(FLOOR)}: {row['psnr']:.1f} dB"
            axes.axhline(min(row["psnr"], top), linestyle="--", color="gray", label=said)
        if row["plan"] == DENSE:
            axes.axvline(row["seconds"], linestyle=":", color="gray", label="dense")
    axes.set_xlabel("seconds a picture" + (" (of one core)" if "cpu" in title else ""))
    axes.set_ylabel("PSNR against the dense pictures, dB")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=130, format="png")
    pyplot.close(figure)


def read(folder: Path, about: Row, name: str = "chart") -> list[Row]:
    """Rows of an earlier chart of the same model, pictures and device; none where it is another.

    Raises ValueError for a file that is no chart.
    """
    file = folder / f"{name}.json"
    if not file.is_file():
        return []
    content = read_json(file, "move it away, and measure again")
    if any(content.get(key) != value for key, value in about.items()):
        return []
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise ValueError(f"{file} holds no rows of a chart: move it away, and measure again")
    return rows


def _is_row(row: Any) -> bool:
    numbers = [name for _, name, _ in COLUMNS]
    return (
        isinstance(row, dict)
        and isinstance(row.get("plan"), str)
        and all(isinstance(row.get(name, 0), int | float) for name in numbers)
    )


def write(folder: Path, rows: Sequence[Row], about: Row, name: str = "chart") -> None:
    """`NAME.json`, `NAME.md` and, where matplotlib is installed, `NAME.png` in a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {**about, "take": chosen(rows), "rows": list(rows)}
    with whole_file(folder / f"{name}.json") as file:
        file.write_text(json.dumps(content, indent=1) + "\n")
    said = ", ".join(f"{key} {value}" for key, value in about.items())
    with whole_file(folder / f"{name}.md") as file:
        file.write_text(f"{table(rows)}\n{sentence(rows)}\n\n{said}.\n")
    try:
        with whole_file(folder / f"{name}.png") as file:
            draw(rows, file, f"{about['model']}, {about['device']}")
    except ImportError:
        return
