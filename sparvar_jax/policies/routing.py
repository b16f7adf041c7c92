"""Which layers and scales a policy takes, and how it refuses to take another one's."""

from __future__ import annotations

from collections.abc import Callable

from sparvar_jax.plans.plan import Plan, Step, map_attention
from sparvar_jax.plans.rows import LayoutName
from sparvar_jax.plans.strategy import Attention, Dense

Policy = Callable[[Plan], Plan]
Layers = tuple[int | float, int | float] | None
"""Layers [start, stop), each a number or a share of the depth; None means every layer."""


def assign(
    plan: Plan,
    layers: Layers,
    choose: Callable[[int], Attention | None],
    *,
    layout: LayoutName | None = None,
) -> Plan:
    """The plan with `choose(scale index)` in the given layers, which must still be dense there.

    Raises ValueError when another policy already changed a layer that this one wants.
    """
    start, stop = layer_range(layers, plan.depth)

    def pick(step: Step, layer: int) -> Attention | None:
        new = choose(step.scale.index) if start <= layer < stop else None
        old = step.segment(layer).attention
        if new is not None and not isinstance(old, Dense):
            raise ValueError(
                f"scale {step.scale.index}, layer {layer}: {new.name} would replace {old.name}; "
                "give the two policies different layers, such as layers=(0, 11) and (11, 32)"
            )
        return new

    return map_attention(plan, pick, layout=layout)


def layer_range(layers: Layers, depth: int) -> tuple[int, int]:
    """Layers [start, stop) as numbers. Raises ValueError unless some of the model's are meant."""
    start, stop = (layer_at(bound, depth) for bound in layers or (0, depth))
    if not 0 <= start < stop <= depth:
        raise ValueError(f"layers must be a non-empty range within 0..{depth}, got {start}..{stop}")
    return start, stop


def layer_at(bound: int | float, depth: int) -> int:
    """A layer bound as it is, or from a positive share of the depth (at least one layer)."""
    return max(round(bound * depth), int(bound > 0)) if isinstance(bound, float) else bound
