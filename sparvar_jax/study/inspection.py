"""What sparse attention rests on, measured in a real generation: sinks, locality, like scales.

Every layer of the observed scales runs its plan as usual; beside it the dense attention of the
first row (conditional) is measured. Nothing here is fast: it forms all scores, a tile at a time.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from pallas_kernels import boxes_table
from sparvar_jax.plans.plan import Plan, map_attention
from sparvar_jax.plans.strategy import Attention, LayerState, Output, Place, View
from sparvar_jax.policies.adaptive import carry_matrices
from sparvar_jax.policies.csla import WINDOWS, geometry_of, windows_of
from sparvar_jax.policies.indices import ceil_div
from sparvar_jax.runtime.state import ScaleOutput

Found = dict[tuple[int, int], dict[str, np.ndarray]]
"""(scale, layer) -> what was measured there."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What to measure. scales: how many, from the end. block: width of the attention map's cells.

    windows, sinks: of the locality measure, as in `csla`.
    """

    scales: int = 3
    block: int = 128
    windows: tuple[int, ...] = WINDOWS
    sinks: int = 5


@dataclasses.dataclass(frozen=True)
class Observed:
    """An attention that also reports on its layer."""

    inner: Attention
    options: Options

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def layouts(self) -> tuple[Any, ...]:
        return self.inner.layouts

    @property
    def reads(self) -> frozenset[str]:
        return self.inner.reads

    @property
    def writes(self) -> frozenset[str]:
        return self.inner.writes

    def pairs(self, place: Place) -> float:
        return self.inner.pairs(place)

    def scales(self, place: Place) -> frozenset[int]:
        return self.inner.scales(place)

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """The inner attention's result, with what was measured as its report."""
        output = self.inner(view, q, place, state)
        found = measure(q[:1], view.k[:1], place, self.options)
        first = View(view.k[:1], view.v[:1])
        found["kept"] = kept_blocks(self.inner, q[:1], first, place, state, self.options.block)
        return output._replace(report={name: value[None] for name, value in found.items()})


def measure(
    q: Float[Array, "1 H T D"], k: Float[Array, "1 H S D"], place: Place, options: Options
) -> dict[str, jax.Array]:
    """Shares of dense attention mass per head: on key blocks, on sinks, and inside windows.

    map [H, query blocks, key blocks], rows sum to one; sinks [H]; inside [H] (windows and sinks).
    """
    rows = place.rows.physical(place.index)
    keys = k[0][:, rows].astype(jnp.float32)
    heads, queries, depth = q.shape[1:]
    block = options.block
    tiles = ceil_div(queries, block)
    padded = jnp.pad(q[0].astype(jnp.float32), ((0, 0), (0, tiles * block - queries), (0, 0)))
    padded = padded.reshape(heads, tiles, block, depth).swapaxes(0, 1)
    real = (np.arange(tiles * block) < queries).reshape(tiles, block)
    blocks = ceil_div(len(rows), block)
    sink_tokens = sum(s.tokens for s in place.schedule.scales[: options.sinks])

    def one(args):
        tile, seen, number = args
        scores = jnp.einsum("htd,hsd->hts", tile, keys, precision="highest")
        mass = jax.nn.softmax(scores, -1) * seen[None, :, None]
        local = window_mask(number, place, options)
        pad = jnp.pad(mass.sum(1), ((0, 0), (0, blocks * block - len(rows))))
        by_block = pad.reshape(heads, blocks, block).sum(-1)
        return by_block, mass[:, :, :sink_tokens].sum((1, 2)), (mass * local).sum((1, 2))

    by_block, sinks, inside = jax.lax.map(one, (padded, real, jnp.arange(tiles)))
    shares = by_block / by_block.sum(-1, keepdims=True)
    return {
        "map": shares.swapaxes(0, 1),
        "sinks": sinks.sum(0) / queries,
        "inside": inside.sum(0) / queries,
    }


def window_mask(tile: jax.Array, place: Place, options: Options) -> Bool[Array, "1 T tokens"]:
    """The token rule of one tile of `block` queries, from the bounds of both axes."""
    scale, scales = place.scale, place.schedule.scales[: place.index + 1]
    windows = windows_of(options.windows, len(place.schedule))
    grids = geometry_of(place).keys
    query = jnp.minimum(tile * options.block + jnp.arange(options.block), scale.tokens - 1)
    parts = []
    for key, grid in zip(scales, grids, strict=True):
        sink, window = key.index < options.sinks, windows[key.index]
        seen = jnp.ones((options.block, 1, 1), bool)
        for axis, (length, size) in enumerate(
            ((scale.height, grid.height), (scale.width, grid.width))
        ):
            bounds = jnp.asarray(boxes_table.axis_bounds(length, size, window, sink))
            at = bounds[(query // scale.width, query % scale.width)[axis]]
            near = (jnp.arange(size) >= at[:, :1]) & (jnp.arange(size) <= at[:, 1:])
            seen = seen & jnp.expand_dims(near, 2 - axis)
        parts.append(seen.reshape(options.block, -1))
    return jnp.concatenate(parts, 1)[None]


def kept_blocks(
    attention: Attention,
    q: Float[Array, "1 H T D"],
    view: View,
    place: Place,
    state: LayerState,
    block: int,
) -> Float[Array, "H Gq Gk"]:
    """The attention's own mass on key blocks, for any strategy: values are one-hot block numbers.

    Blocks it never reads get zero. Carried outputs ("difference") are left out.
    """
    rows, (k, _) = place.rows.physical(place.index), view
    depth = k.shape[-1]
    number = np.full(k.shape[2], -1)
    number[rows] = np.arange(len(rows)) // block
    quiet = {
        name: jnp.zeros_like(x[:1]) if name.endswith("difference") else x[:1]
        for name, x in state.items()
    }
    parts = []
    for first in range(0, int(number.max()) + 1, depth):
        hot = jnp.asarray(number[:, None] == first + np.arange(depth), k.dtype)
        out = attention(View(k, jnp.broadcast_to(hot, k.shape)), q, place, quiet).out
        parts.append(out[0].astype(jnp.float32))
    mass = jnp.concatenate(parts, -1)[..., : int(number.max()) + 1]
    pad = -mass.shape[1] % block
    mass = jnp.pad(mass, ((0, 0), (0, pad), (0, 0)))
    mass = mass.reshape(mass.shape[0], -1, block, mass.shape[-1]).sum(2)
    return mass / jnp.maximum(mass.sum(-1, keepdims=True), 1e-9)


def observe(plan: Plan, options: Options) -> Plan:
    """The plan with observed attention in its last scales."""
    first = len(plan.schedule) - options.scales

    def watch(step, layer):
        inner = step.segment(layer).attention
        return Observed(inner, options) if step.scale.index >= first else None

    return map_attention(plan, watch)


def collect(outputs: Sequence[ScaleOutput]) -> Found:
    """What the layers of an observed generation reported of the first picture."""
    return {
        (scale, layer): {name: np.asarray(value[0]) for name, value in report.items()}
        for scale, output in enumerate(outputs)
        for layer, report in enumerate(output.reports)
        if report
    }


def summarise(
    plan: Plan, found: Mapping[tuple[int, int], Mapping[str, np.ndarray]], options: Options
) -> list[dict[str, Any]]:
    """One JSON row a scale and layer, with lists over heads.

    sinks, inside: shares of dense mass. covered: share of the dense mass on blocks the plan reads.
    likeness: cosine between this scale's attention map and the previous scale's, carried over.
    """
    rows = []
    for (scale, layer), arrays in sorted(found.items()):
        step = next(i for i, s in enumerate(plan.steps) if s.scale.index == scale)
        place = dataclasses.replace(plan.place(step), layout_name="packed", rows=None)
        before = found.get((scale - 1, layer))
        kept = arrays["kept"] > 1e-7
        rows.append(
            {
                "scale": scale,
                "layer": layer,
                "attention": plan.steps[step].segment(layer).attention.name,
                "sinks": arrays["sinks"].tolist(),
                "inside": arrays["inside"].tolist(),
                "covered": (arrays["map"] * kept).sum(-1).mean(-1).tolist(),
                "blocks_read": kept.mean((1, 2)).tolist(),
                "likeness": None
                if before is None
                else likeness(before["map"], arrays["map"], place, options.block).tolist(),
            }
        )
    return rows


def likeness(
    before: Float[np.ndarray, "H Gq Gk"],
    now: Float[np.ndarray, "H Gq2 Gk2"],
    place: Place,
    block: int,
) -> Float[np.ndarray, "H"]:
    """Cosine per head of two scales' attention maps, the earlier carried to the later."""
    queries, keys = carry_matrices(place, place.index - 1, block, block)
    carried = np.einsum("Aa,hab,bB->hAB", queries, before, keys)
    product = (carried * now).sum((1, 2))
    return product / np.sqrt((carried**2).sum((1, 2)) * (now**2).sum((1, 2)))
