"""A plan as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparvar_jax.plans.plan import Plan


def describe(plan: Plan) -> str:
    """One line a segment: scale, rows, layers, strategy, tokens, keys a query and density.

    A token rule or a store that is not the usual one is named beside the attention.
    """
    lines = ["scale  grid      rows  layers   attention             tokens   keys/query  density"]
    for index, step in enumerate(plan.steps):
        for segment in step.segments:
            place = plan.place(index, segment.layers[0])
            keys = segment.attention.pairs(place) / place.queries
            grid = f"{step.scale.height}x{step.scale.width}" if step.scale.grid else "prefix"
            layers = f"{segment.layers[0]}-{segment.layers[1] - 1}"
            lines.append(
                f"{step.scale.index:5d}  {grid:8s}  {step.rows:4s}  {layers:7s}  "
                f"{_named(segment):20s}  {place.queries:6d}  {keys:10.0f}  "
                f"{keys / step.scale.end:7.3f}"
            )
    lines.append(
        f"density {plan.density():.3f} over the last three scales, "
        f"{plan.density(None):.3f} over all; layout {plan.layout}"
    )
    return "\n".join(lines)


def _named(segment) -> str:
    others = [part.name for part in (segment.tokens, segment.store)]
    usual = ("all", "full")
    more = [name for name, plain in zip(others, usual, strict=True) if name != plain]
    return ", ".join([segment.attention.name, *more])
