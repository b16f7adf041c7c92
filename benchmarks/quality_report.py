"""Tables, contact sheets and the chart of quality against kept work."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.quality_plans import label

COLUMNS = (
    "psnr", "ssim", "ms_ssim", "distance", "bit_agreement", "density", "density_all", "seconds"
)  # fmt: skip
WORK = {"density": "kept (query, key) pairs of the last three scales", "seconds": "seconds"}
DIFFERENCE_GAIN = 4
Rows = list[dict[str, Any]]


def line(rows: Rows) -> str:
    """One plan's rows in one line of the log."""
    parts = [f"{row['subset']} {row['psnr']:.2f} dB, SSIM {row['ssim']:.3f}" for row in rows]
    return f"{label(rows[0]['plan'])}: {'; '.join(parts)}; density {rows[0]['density']:.3f}"


def table(rows: Rows) -> str:
    """All rows as a markdown table, one section a subset."""
    lines = []
    for subset in dict.fromkeys(row["subset"] for row in rows):
        lines += [f"\n### {subset}\n", f"| plan | {' | '.join(COLUMNS)} |"]
        lines.append("| --- |" + " --- |" * len(COLUMNS))
        for row in rows:
            if row["subset"] == subset:
                cells = [_cell(row.get(column), column) for column in COLUMNS]
                lines.append(f"| {label(row['plan'])} | {' | '.join(cells)} |")
    return "\n".join(lines).strip() + "\n"


def _cell(value: float | None, column: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if column == "psnr" else f"{value:.3f}"


def sheet(dense: np.ndarray, sparse: np.ndarray, count: int = 6) -> Image.Image:
    """Rows of (dense, sparse, difference times four) of pictures spread over the list."""
    chosen = np.linspace(0, len(dense) - 1, min(count, len(dense))).astype(int)
    rows = []
    for a, b in zip(dense[chosen], sparse[chosen], strict=True):
        gap = np.abs(a.astype(int) - b.astype(int)) * DIFFERENCE_GAIN
        rows.append(np.concatenate([a, b, gap.clip(0, 255).astype(np.uint8)], 1))
    return Image.fromarray(np.concatenate(rows))


def chart(rows: Rows, file: pathlib.Path, subset: str, work: str) -> None:
    """PSNR against kept work or time of every plan with a picture measure, as PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 6))
    for row in rows:
        if row["subset"] == subset and row["psnr"] is not None:
            preset = row["plan"].startswith(("sparvar-", "adaptive"))
            axes.scatter(row[work], row["psnr"], color="tab:red" if preset else "tab:blue")
            axes.annotate(
                label(row["plan"]), (row[work], row["psnr"]), fontsize=7,
                xytext=(4, 2), textcoords="offset points",
            )  # fmt: skip
    axes.set_xlabel(WORK[work])
    axes.set_ylabel(f"PSNR against dense, dB ({subset})")
    axes.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def write(
    results: pathlib.Path, rows: Rows, pictures: dict[str, np.ndarray], kinds: list[str]
) -> None:
    """Table, sheets and charts beside a results file."""
    results.with_suffix(".md").write_text(table(rows))
    for name, sparse in pictures.items():
        if name != "dense":
            stem = "".join(c if c.isalnum() else "-" for c in label(name)).strip("-")
            image = sheet(pictures["dense"], sparse)
            image.save(results.with_name(f"{results.stem}-{stem}.webp"), quality=85)
    for subset in dict.fromkeys(kinds):
        for work in WORK:
            chart(rows, results.with_name(f"{results.stem}-{subset}-{work}.png"), subset, work)
