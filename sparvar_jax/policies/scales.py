"""Dropping pieces of work in the last scales: the scales, or their unconditional rows."""

from __future__ import annotations

import dataclasses

from sparvar_jax.plans.plan import Plan, map_attention
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.routing import Policy


@checked
def skip_last_scales(count: int) -> Policy:
    """Do not draw the last `count` scales of the schedule; the picture keeps its size.

    The codes drawn so far are decoded as they are. Raises ValueError when nothing would be left.
    """

    def apply(plan: Plan) -> Plan:
        _check("skip_last_scales", count, len(plan.schedule) - 1)
        return dataclasses.replace(plan, steps=plan.steps[: len(plan.schedule) - count])

    return apply


@checked
def drop_uncond(count: int) -> Policy:
    """Run only the conditional rows in the last `count` scales of the schedule.

    Guidance is off in those scales: there is nothing left to guide against. The unconditional rows
    are gone for good, so the count is one run of scales at the end.
    """

    def apply(plan: Plan) -> Plan:
        _check("drop_uncond", count, len(plan.schedule))
        first = len(plan.schedule) - count
        steps = tuple(
            dataclasses.replace(step, rows="cond", merge_at=None)
            if step.scale.index >= first
            else step
            for step in plan.steps
        )
        return map_attention(dataclasses.replace(plan, steps=steps), lambda step, layer: None)

    return apply


def _check(name: str, count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"{name} takes a number of scales in 0..{most}, got {count}")
