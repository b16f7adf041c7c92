"""Which layers and scales a policy takes, and how it refuses to take another one's."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparvar_jax.plan import Plan, Step, map_attention
from sparvar_jax.schedule import ROW_MULTIPLE, LayoutName
from sparvar_jax.strategy import Attention, Dense, Place

Policy = Callable[[Plan], Plan]
Layers = tuple[int, int] | None
"""Layers [start, stop); None means every layer."""


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
    start, stop = layers or (0, plan.depth)
    if not 0 <= start < stop <= plan.depth:
        raise ValueError(
            f"layers must be a non-empty range within 0..{plan.depth}, got {start}..{stop}"
        )

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


def packed_rows(x: Float[Array, "Rk H S D"], rows: int, place: Place) -> Float[Array, "R H P D"]:
    """The first `rows` rows of a cache with its tokens packed, whatever the layout.

    The packed layout is handed on as it is; an aligned cache is copied without its pad rows, so
    that column and block numbers mean the same tokens everywhere.
    """
    layout = place.layout
    if layout.name == "packed":
        return x
    parts = []
    for index, (height, width) in enumerate(layout.sizes[: place.index + 1]):
        part = jax.lax.slice_in_dim(x[:rows], layout.starts[index], layout.filled(index), axis=2)
        grid = part.reshape(*part.shape[:2], height, layout.pitches[index], part.shape[-1])
        parts.append(grid[:, :, :, :width].reshape(*part.shape[:2], -1, part.shape[-1]))
    pad = -place.scale.end % ROW_MULTIPLE
    parts.append(jnp.zeros((*parts[0].shape[:2], pad, x.shape[-1]), x.dtype))
    return jnp.concatenate(parts, axis=2)
