"""A plan's pictures beside the dense ones of the same seeds: seconds, likeness, one sheet."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.study.bench import DENSE, Drawn, compare
from sparvar_jax.study.bench_page import DIFFERENCE_GAIN, sheet
from sparvar_jax.weights.told import told

NARROWEST = 256
"""Pixels below which a column of the sheet has no room for its heading."""
_LETTERS = 18  # columns of this many pixels a letter's height hold every heading
_PAPER, _INK = (255, 255, 255), (28, 36, 48)


@dataclasses.dataclass(frozen=True)
class Beside:
    """What a plan drew, what the dense plan drew, and how both were.

    seconds, dense_seconds: of one whole call each on this device, compiled before. The plan is
    drawn first, so that what a first call costs besides falls on it, not on the dense plan.
    psnr (dB), ssim: of the pictures against the dense ones, means.
    """

    plan: str
    pictures: Drawn
    seconds: float
    dense: Drawn
    dense_seconds: float
    psnr: float
    ssim: float

    def line(self) -> str:
        """Times and likeness in one line."""
        return (
            f"dense took {self.dense_seconds:.2f} s, {self.plan} {self.seconds:.2f} s "
            f"({self.dense_seconds / self.seconds:.2f} times as fast); "
            f"PSNR {self.psnr:.1f} dB, SSIM {self.ssim:.3f} between them"
        )


def sparse_plan(pipe: Pipeline, options: dict[str, Any]) -> Plan:
    """The plan that a call with these options draws by; ValueError where that is the dense one."""
    plan, _ = pipe.model.family.asked(pipe.model.name, options).resolve(pipe.model)
    if plan.name == DENSE:
        raise ValueError("the plan is dense itself: name one to hold against it, as by --plan")
    return plan


def timed(pipe: Pipeline, subject: Any, **options: Any) -> tuple[Drawn, float]:
    """Pictures, and the seconds of the call that drew them; what it runs is compiled before."""
    pipe.warm_up(subject, **options)
    start = time.perf_counter()
    return np.asarray(pipe(subject, **options)), time.perf_counter() - start


def beside_dense(
    pipe: Pipeline,
    subject: Any,
    *,
    drawn: tuple[Drawn, float] | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> Beside:
    """Draw the same with the dense plan, and compare.

    drawn: pictures of these options and the seconds they took, where they are there already.
    progress: called as ("measure", calls done, calls). Raises ValueError where the plan is dense.
    """
    name = sparse_plan(pipe, options).name
    asked = {name: options, DENSE: options | {"plan": DENSE}}
    found = {} if drawn is None else {name: drawn}
    for done, (plan, how) in enumerate(asked.items(), 1):
        if plan not in found:
            found[plan] = timed(pipe, subject, **how)
        if progress:
            progress("measure", done, len(asked))
    (pictures, seconds), (dense, dense_seconds) = found[name], found[DENSE]
    likeness = compare(dense, pictures)
    return Beside(name, pictures, seconds, dense, dense_seconds, *likeness)


def lettered(found: Beside, below: str) -> UInt8[np.ndarray, "height width 3"]:
    """Dense, sparse and four times their difference with times and PSNR above, a line below.

    Pictures are shown larger by a whole number where a heading would not fit over them.
    """
    rows = sheet(found.dense, found.pictures)
    zoom = -(-NARROWEST * 3 // rows.shape[1])
    rows = rows.repeat(zoom, 0).repeat(zoom, 1)
    height, width = rows.shape[:2]
    column, size = width // 3, width // 3 // _LETTERS
    band = 2 * size
    page = Image.new("RGB", (width, height + 2 * band), _PAPER)
    page.paste(Image.fromarray(rows), (0, band))
    pen = ImageDraw.Draw(page)
    headings = (
        f"dense: {found.dense_seconds:.2f} s",
        f"{found.plan}: {found.seconds:.2f} s",
        f"{DIFFERENCE_GAIN} x difference: {found.psnr:.1f} dB",
    )
    for index, text in enumerate(headings):
        _write(pen, text, (index * column, 0), (column, band), size)
    _write(pen, below, (0, height + band), (width, band), size)
    return np.asarray(page)


def _write(
    pen: ImageDraw.ImageDraw, text: str, corner: tuple[int, int], room: tuple[int, int], size: int
) -> None:
    """One line of text, in smaller letters where it is long."""
    text, margin = told(text, 200), size // 2
    font = ImageFont.load_default(size)
    length = pen.textlength(text, font)
    if length > room[0] - 2 * margin:
        font = ImageFont.load_default(max(1, int(size * (room[0] - 2 * margin) / length)))
    place = (corner[0] + margin, corner[1] + room[1] // 2)
    pen.text(place, text, fill=_INK, font=font, anchor="lm")
