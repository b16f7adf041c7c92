"""A bench report as one HTML page that needs no other file: table, bars, sheets, JSON."""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import json
from collections.abc import Sequence

import numpy as np
from PIL import Image

from sparvar_jax.study.bench import DENSE, Drawn, Report, Row

LARGEST_SIDE = 512
"""Pixels of a side above which pictures on the page are shown smaller."""
DIFFERENCE_GAIN = 4
_SHOWN = 4
COLUMNS = (
    "plan", "density", "seconds", "spread", "parts, ms", "images/s", "planned GiB", "peak GiB",
    "PSNR dB", "SSIM", "compile s",
)  # fmt: skip
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c2430; background: #fff; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #d7dde5; }
th:first-child, td:first-child { text-align: left; }
caption { text-align: left; padding-bottom: .5rem; }
.bar { background: #2f6fde; height: .5rem; border-radius: .25rem; }
figure { margin: 1.5rem 0; } img { max-width: 100%; height: auto; image-rendering: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; } dd { margin: 0; }
.scroll { overflow-x: auto; }
@media (prefers-color-scheme: dark) { body { color: #e6eaf0; background: #14181f; }
  th, td { border-color: #333c49; } }
"""


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table, as text under `COLUMNS`."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    parts = ", ".join(f"{name} {1000 * seconds:.0f}" for name, seconds in row.parts.items())
    return (
        row.plan,
        number(row.density, 3),
        number(row.seconds, 3),
        number(row.spread, 3),
        parts,
        number(row.images_per_second, 2),
        number(row.planned_gib, 2),
        number(row.peak_gib, 2),
        number(row.psnr, 2),
        number(row.ssim, 3),
        number(row.compile_seconds, 1),
    )


def page(report: Report) -> str:
    """The page as text."""
    title = f"sparvar bench: {report.about['model']} on {report.about['device']}"
    about = "".join(
        f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>"
        for name, value in report.about.items()
    )
    sheets = "".join(
        _sheet(name, report.pictures[DENSE], pictures)
        for name, pictures in report.pictures.items()
        if name != DENSE
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>"
        f"<h1>{html.escape(title)}</h1><dl>{about}</dl>{_table(report.rows)}"
        "<p>Parts are timed apart, each waited for. Peak is shown where a plan raised it. Density "
        "is kept over dense (query, key) pairs of the last three scales. Kernels that round "
        "otherwise turn bits too: distances hold rounding as well as sparsity.</p>"
        f"{sheets}{_json(report)}</body></html>\n"
    )


def _table(rows: Sequence[Row]) -> str:
    longest = max(row.seconds for row in rows)
    heads = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in COLUMNS)
    lines = []
    for row in rows:
        bar = f'<div class="bar" style="width:{100 * row.seconds / longest:.1f}%"></div>'
        name, *others = (html.escape(cell) for cell in cells(row))
        data = "".join(f"<td>{cell}</td>" for cell in others)
        lines.append(f"<tr><td>{name}{bar}</td>{data}</tr>")
    return (
        '<div class="scroll"><table><caption>Bars: seconds a call, the slowest plan full width'
        f"</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _sheet(name: str, dense: Drawn, sparse: Drawn) -> str:
    picture = Image.fromarray(sheet(dense[:_SHOWN], sparse[:_SHOWN]))
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=90)
    data = base64.b64encode(content.getvalue()).decode()
    escaped = html.escape(name)
    return (
        f"<figure><figcaption>{escaped}: dense, {escaped}, {DIFFERENCE_GAIN} times their difference"
        f'</figcaption><img alt="dense, {escaped} and their difference" '
        f'src="data:image/webp;base64,{data}"></figure>'
    )


def sheet(dense: Drawn, sparse: Drawn) -> np.ndarray:
    """Rows of (dense, sparse, difference times four), uint8 RGB, shown smaller where large."""
    height, width = dense.shape[1:3]
    shrink = max(1, -(-max(height, width) // LARGEST_SIDE))
    rows = []
    for a, b in zip(dense, sparse, strict=True):
        gap = np.abs(a.astype(int) - b.astype(int)) * DIFFERENCE_GAIN
        row = np.concatenate([a, b, gap.clip(0, 255).astype(np.uint8)], 1)
        rows.append(np.asarray(Image.fromarray(row).reduce(shrink)))
    return np.concatenate(rows)


def _json(report: Report) -> str:
    """The numbers for programs; `<` is escaped, so that no name can end the element."""
    values = {"about": dict(report.about), "rows": [dataclasses.asdict(r) for r in report.rows]}
    text = json.dumps(values).replace("<", "\\u003c")
    return f'<script type="application/json" id="report">{text}</script>'
