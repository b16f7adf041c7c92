"""A plan as a table for people."""

from __future__ import annotations

from collections.abc import Callable

from sparvar_jax.plans.segments import Segment, Step
from sparvar_jax.plans.strategy import Place


def describe(steps: tuple[Step, ...], place_of: Callable[[int, int], Place], footer: str) -> str:
    """One line a segment: scale, rows, layers, strategy, tokens, keys a query and density.

    A token rule or a store that is not the usual one is named beside the attention.
    """
    lines = ["scale  grid      rows  layers   attention             tokens   keys/query  density"]
    for index, step in enumerate(steps):
        for segment in step.segments:
            place = place_of(index, segment.layers[0])
            keys = segment.attention.pairs(place) / place.queries
            grid = f"{step.scale.height}x{step.scale.width}" if step.scale.grid else "prefix"
            layers = f"{segment.layers[0]}-{segment.layers[1] - 1}"
            lines.append(
                f"{step.scale.index:5d}  {grid:8s}  {step.rows:4s}  {layers:7s}  "
                f"{_named(segment):20s}  {place.queries:6d}  {keys:10.0f}  "
                f"{keys / step.scale.end:7.3f}"
            )
    return "\n".join([*lines, footer])


def _named(segment: Segment) -> str:
    others = [part.name for part in (segment.tokens, segment.store)]
    usual = ("all", "full")
    more = [name for name, plain in zip(others, usual, strict=True) if name != plain]
    more += [f"{segment.rows} rows"] if segment.rows != "all" else []
    return ", ".join([segment.attention.name, *more])
