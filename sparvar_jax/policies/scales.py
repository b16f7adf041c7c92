"""Dropping pieces of work in the last scales: the scales, or their unconditional rows."""

from __future__ import annotations

import dataclasses

from sparvar_jax.plans.plan import Plan, Segment, Step, map_attention, map_segments
from sparvar_jax.plans.segments import SegmentRows
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.indices import scale_index
from sparvar_jax.policies.routing import Layers, Policy, layer_at, layer_range


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
def drop_uncond(count: int, ramp: tuple[tuple[int, int | float], ...] = ()) -> Policy:
    """Run only the conditional rows in the last `count` scales of the schedule.

    Guidance is off in those scales: there is nothing left to guide against. The unconditional rows
    are gone for good, so the count is one run of scales at the end.

    ramp: (scale, layers) pairs for earlier scales, whose unconditional rows run through that many
    first layers, or that share of them, and then are given what the conditional rows add: their
    difference stays as it is, and guidance goes on. Layers must not grow from scale to scale.
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
        plan = dataclasses.replace(plan, steps=_plain_rows(steps))
        return _ramped(map_attention(plan, lambda step, layer: None), ramp)

    return apply


@checked
def guidance_range(turn_on_cfg_start_si: int = 0, turn_off_cfg_start_si: int = 10) -> Policy:
    """Guide in scales [on, off) alone, by the names and defaults of Switti (arXiv 2412.01819).

    Before `turn_on_cfg_start_si` both rows run and logits are the conditional ones; from
    `turn_off_cfg_start_si` on only the conditional rows run, as with `drop_uncond`.
    """

    def apply(plan: Plan) -> Plan:
        scales = len(plan.schedule)
        on, off = turn_on_cfg_start_si, turn_off_cfg_start_si
        if not 0 <= on <= off <= scales:
            raise ValueError(
                f"guidance_range needs 0 <= on <= off <= {scales} scales, got {on} and {off}"
            )
        plan = drop_uncond(scales - off)(plan)
        steps = tuple(
            dataclasses.replace(step, merge_at=None) if step.scale.index < on else step
            for step in plan.steps
        )
        return map_attention(dataclasses.replace(plan, steps=steps), lambda step, layer: None)

    return apply


@checked
def share_rows(last: int = 3, layers: Layers = None) -> Policy:
    """Self-attention of the conditional rows serves the unconditional ones (LiteVAR, 2411.17178).

    last: in so many last scales. layers: [start, stop), numbers or shares of the depth. Guidance
    stays on: cross-attention, feed-forward and head run all rows. From the first such scale on the
    layer keeps no keys of the unconditional rows. Scales without unconditional rows are as before.
    """

    def apply(plan: Plan) -> Plan:
        _check("share_rows", last, len(plan.schedule))
        start, stop = layer_range(layers, plan.depth)
        first = len(plan.schedule) - last

        def change(step: Step, layer: int, old: Segment) -> Segment:
            wanted = step.scale.index >= first and start <= layer < stop
            return _with_rows(step, layer, old, "shared") if wanted else old

        return map_segments(plan, change)

    return apply


def _ramped(plan: Plan, ramp: tuple[tuple[int, int | float], ...]) -> Plan:
    """The plan whose unconditional rows run through the first layers of some scales alone."""
    if not ramp:
        return plan
    layers = {
        scale_index(plan.schedule, scale): layer_at(bound, plan.depth) for scale, bound in ramp
    }
    if not all(0 <= bound <= plan.depth for bound in layers.values()):
        raise ValueError(f"a ramp names layers in 0..{plan.depth}, got {ramp}")

    def change(step: Step, layer: int, old: Segment) -> Segment:
        wanted = layer >= layers.get(step.scale.index, plan.depth)
        return _with_rows(step, layer, old, "cond") if wanted else old

    return map_segments(plan, change)


def _with_rows(step: Step, layer: int, old: Segment, rows: SegmentRows) -> Segment:
    """The segment with other rows; what has no unconditional rows stays."""
    if step.rows == "cond":
        return old
    if old.rows not in ("all", rows):
        raise ValueError(
            f"scale {step.scale.index}, layer {layer}: {rows} rows would replace {old.rows} rows; "
            "give share_rows and a ramp different layers"
        )
    return dataclasses.replace(old, rows=rows)


def _plain_rows(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """Steps of conditional rows alone have nothing to share or to drop."""
    return tuple(
        step
        if step.rows == "both"
        else dataclasses.replace(
            step, segments=tuple(dataclasses.replace(s, rows="all") for s in step.segments)
        )
        for step in steps
    )


def _check(name: str, count: int, most: int) -> None:
    if not 0 <= count <= most:
        raise ValueError(f"{name} takes a number of scales in 0..{most}, got {count}")
