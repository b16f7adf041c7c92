"""A plot of error by scale on a logarithmic axis, drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

SIZE = (960, 540)
MARGIN = (80, 40, 220, 60)  # left, top, right (legend), bottom
FLOOR = 1e-9
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")
_INK, _GRID = "#222222", "#dddddd"


def draw_errors(
    path: Path, curves: Mapping[str, Sequence[tuple[int, float]]], tolerance: float
) -> None:
    """Write a PNG: one curve a name, points (scale, relative error), a line at the tolerance.

    Scale -1 stands for arrays that belong to no scale; errors below 1e-9 are drawn there.
    """
    scales = sorted({scale for points in curves.values() for scale, _ in points})
    errors = [error for points in curves.values() for _, error in points if math.isfinite(error)]
    top = math.ceil(math.log10(max([tolerance, *errors]) * 1.0001))
    image = Image.new("RGB", SIZE, "white")
    frame = _Frame(ImageDraw.Draw(image), scales, top)
    frame.axes()
    y = frame.y(tolerance)
    frame.draw.line([(frame.left, y), (frame.right, y)], fill="#c00000", width=1)
    frame.text((frame.left + 6, y - 18), f"tolerance {tolerance:g}", "#c00000")
    for index, (name, points) in enumerate(curves.items()):
        frame.curve(name, points, index)
    image.save(path, format="PNG")


class _Frame:
    """Coordinates and drawing of one plot."""

    def __init__(self, draw: ImageDraw.ImageDraw, scales: list[int], top: int) -> None:
        self.draw, self.scales = draw, scales
        self.top_power, self.low_power = top, math.log10(FLOOR)
        self.left, self.top = MARGIN[0], MARGIN[1]
        self.right, self.bottom = SIZE[0] - MARGIN[2], SIZE[1] - MARGIN[3]
        self.font = ImageFont.load_default(size=14)

    def x(self, scale: int) -> float:
        share = (self.scales.index(scale) + 0.5) / len(self.scales)
        return self.left + share * (self.right - self.left)

    def y(self, error: float) -> float:
        power = math.log10(min(max(error, FLOOR), 10.0**self.top_power))
        share = (power - self.low_power) / (self.top_power - self.low_power)
        return self.bottom - share * (self.bottom - self.top)

    def text(self, place: tuple[float, float], text: str, colour: str = _INK) -> None:
        self.draw.text(place, text, fill=colour, font=self.font)

    def axes(self) -> None:
        for power in range(int(self.low_power), self.top_power + 1):
            y = self.y(10.0**power)
            self.draw.line([(self.left, y), (self.right, y)], fill=_GRID)
            self.text((self.left - 52, y - 9), f"1e{power}")
        for scale in self.scales:
            self.text((self.x(scale) - 6, self.bottom + 8), "-" if scale < 0 else str(scale))
        self.draw.rectangle([self.left, self.top, self.right, self.bottom], outline=_INK)
        self.text((self.left, self.top - 26), "largest relative error, PyTorch twin against JAX")
        self.text(((self.left + self.right) / 2 - 20, self.bottom + 32), "scale")

    def curve(self, name: str, points: Sequence[tuple[int, float]], index: int) -> None:
        colour = COLOURS[index % len(COLOURS)]
        places = [(self.x(scale), self.y(error)) for scale, error in points]
        self.draw.line(places, fill=colour, width=2)
        for x, y in places:
            self.draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=colour)
        y = self.top + 20 * index
        self.draw.line([(self.right + 14, y + 9), (self.right + 34, y + 9)], fill=colour, width=3)
        self.text((self.right + 42, y), name)
