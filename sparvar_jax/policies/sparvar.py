"""SparVAR as published: CS4A in the first layers, CSLA in the rest, from one decision scale on."""

from __future__ import annotations

from typing import Any, Unpack

from sparvar_jax.plans.plan import Plan
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.cs4a import cs4a
from sparvar_jax.policies.csla import CslaOptions, csla
from sparvar_jax.policies.routing import Policy, layer_at

TEXT_WINDOWS = (-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 1, 3, 5, 7)
"""The authors' windows where text stands before the grids (HART): one a key scale, text included.

Their five sinks are the text and four grids. There is no CS4A of theirs for such a schedule.
"""
BOUNDARY = 10
FAST_COLUMNS = (("granularity", 8), ("multiple", 64))
BOUNDARY_SHARE = 11 / 32
"""Share of the layers that decide columns: layers 0..10 of the 32 of the 2B model."""


@checked
def sparvar(
    boundary: int | float = BOUNDARY,
    *,
    first_scale: int | float = -3,
    columns_options: tuple[tuple[str, Any], ...] = (),
    **csla_options: Unpack[CslaOptions],
) -> Policy:
    """CS4A in layers 0..boundary (inclusive), CSLA above, from `first_scale` (the decision) on.

    boundary: a layer, or the share of the layers that use CS4A. columns_options: options of
    `cs4a` as pairs; further keywords go to `csla`. Raises ValueError for a boundary outside the
    model.
    """

    options = dict(columns_options)

    def parts(cut: int, depth: int) -> tuple[Policy, Policy]:
        rest = csla(first_scale=first_scale, layers=(cut, depth), **csla_options)
        return cs4a(first_scale, layers=(0, cut), **options), rest

    parts(1, 2)  # complains before there is a plan

    def apply(plan: Plan) -> Plan:
        cut = boundary_layer(boundary, plan.depth) + 1
        columns, rest = parts(cut, plan.depth)
        return columns(plan) if cut == plan.depth else rest(columns(plan))

    return apply


def published(*, fast: bool = False) -> Policy:
    """The authors' configuration for the plan's schedule, and the layers by its depth.

    Where text stands before the grids it is CSLA alone, in every layer of the last three scales.
    fast: the same windows and budgets in the shapes our kernels like.
    """
    form: Any = {"form": "boxes"} if fast else {}
    columns = FAST_COLUMNS if fast else ()

    def apply(plan: Plan) -> Plan:
        if plan.schedule.prefix:
            return csla(TEXT_WINDOWS, **form)(plan)
        return sparvar(released_boundary(plan.depth), columns_options=columns, **form)(plan)

    return apply


def boundary_layer(boundary: int | float, depth: int) -> int:
    """The last layer that uses CS4A: itself, or from the share of layers (at least one)."""
    if isinstance(boundary, float):
        if not 0 < boundary <= 1:
            raise ValueError(f"a boundary share must lie in (0, 1], got {boundary}")
        return layer_at(boundary, depth) - 1
    if not 0 <= boundary < depth:
        raise ValueError(
            f"boundary layer {boundary} is outside a model of {depth} layers: give 0..{depth - 1}, "
            "or a share of the layers such as 0.34"
        )
    return boundary


def released_boundary(depth: int) -> int:
    """The published boundary layer at depths 32 and 40; the same share of any other depth."""
    return BOUNDARY if depth in (32, 40) else boundary_layer(BOUNDARY_SHARE, depth)
