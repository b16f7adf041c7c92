"""ScaleKV (arXiv 2505.19602): after a scale each layer cuts its keys and values to a fixed number.

Described by its published code (MIT). "Drafters" keep nearly everything, "refiners" little. Rows
are chosen by the raw logits of a few queries of the scale just drawn. It saves memory, not time,
and what is left lies in no grid: only dense attention reads it.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from sparvar_jax.plans.plan import Plan, Segment, Step, map_segments
from sparvar_jax.plans.rows import ROW_MULTIPLE, RowMap, Slot, Span
from sparvar_jax.plans.stores import CacheShape, Full, Write, Writes
from sparvar_jax.plans.strategy import Place, View
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.routing import Policy

FIRST_ROWS = 650
"""Nothing is given up before more rows than these are cached."""
PUBLISHED = {
    "2b": (
        {7: 920, 8: 1490, 9: 2510, 10: 4100, 11: 6385},
        {7: 632, 8: 594, 9: 526, 10: 420, 11: 465},
        {0: 12, 23: 11},
    ),
    "8b": (
        {7: 909, 8: 1464, 9: 2463, 10: 4054, 11: 6200},
        {7: 629, 8: 584, 9: 503, 10: 374, 11: 200},
        {0: 12, 1: 12, 2: 12},
    ),
}
"""Rows left after a scale by drafters and by refiners, and drafter layer -> scales before which it
is one. Of the square schedule."""


@dataclasses.dataclass(frozen=True)
class ScaleKv(Full):
    """A budget of rows after some scales, chosen for every row and head.

    left: (scale, rows left after it) pairs; a scale without one keeps what there is. side: queries
    of a side of the window of side x side, whose tokens always stay. pool: width of the maximum
    over neighbouring scores.
    """

    left: tuple[tuple[int, int], ...] = ()
    side: int = 4
    pool: int = 5

    name = "scalekv"

    def __post_init__(self):
        short = [pair for pair in self.left if pair[1] < self.side**2]
        if short:
            raise ValueError(
                f"scalekv keeps the {self.side**2} rows of its window, got {short[0][1]} rows "
                f"after scale {short[0][0]}: give at least that many"
            )

    def rows(self, whole: RowMap, index: int) -> RowMap:
        """What is left of all earlier scales together as one traced span, then whole scales."""
        before = self._left_before(whole, index)
        if before == (whole.spans[index - 1].stop if index else 0):
            return whole
        spans = [Span(0, before, None, before, "traced")]
        spans += [Span(before, 0, None, 0, "traced")] * (index - 1)
        for span in whole.spans[index:]:
            spans.append(dataclasses.replace(span, start=spans[-1].stop))
        total = -(-spans[-1].stop // ROW_MULTIPLE) * ROW_MULTIPLE
        return RowMap("traced", tuple(spans), total)

    def _left_before(self, whole: RowMap, index: int) -> int:
        """Rows that scale `index` finds."""
        limits, rows = dict(self.left), 0
        for scale, span in enumerate(whole.spans[:index]):
            rows = min(rows + span.rows, limits.get(scale, rows + span.rows))
        return rows

    def start(self, shape: CacheShape, whole: RowMap) -> View:
        most = max(self._left_before(whole, index) for index in range(len(whole.spans)))
        return View(shape.buffer(most), shape.buffer(most))

    def write(self, kept: Any, shared: Any, write: Write, place: Place) -> tuple[jax.Array, Any]:
        if not isinstance(write, Writes):
            raise ValueError("scalekv chooses rows by raw queries, which this model's blocks keep")
        span = place.rows.spans[place.index]
        room = jnp.zeros((*kept.k.shape[:2], span.rows, kept.k.shape[3]), kept.k.dtype)
        q, *new = write(room, room, Slot(0, span.size[1], span.pitch))
        return q, (kept, View(*new), write.queries())

    def view(self, held: Any, place: Place) -> View:
        kept, new, _ = held
        before = place.rows.spans[place.index].start
        pairs = zip(kept, new, strict=True)
        return View(*(jnp.concatenate([old[:, :, :before], more], 2) for old, more in pairs))

    def keep(self, held: Any, q: Float[Array, "R H T D"], place: Place) -> tuple[Any, Any]:
        (kept, _, raw), seen = held, self.view(held, place)
        if place.index + 1 == len(place.schedule):
            return kept, ()
        rows = seen.k.shape[2]
        count = min(rows, dict(self.left).get(place.index, rows))
        if count < rows:
            chosen = self.choose(self.scores(seen.k, raw, place), count, place)[..., None]
            seen = View(*(jnp.take_along_axis(x, chosen, 2) for x in seen))
        pairs = zip(kept, seen, strict=True)
        return View(*(jax.lax.dynamic_update_slice(a, b, (0,) * 4) for a, b in pairs)), ()

    def window(self, place: Place) -> Int[np.ndarray, "W"]:
        """The tokens of the scale drawn that always stay: one in the middle of every patch."""
        scale, axes = place.scale, []
        for length in (scale.height, scale.width):
            patch = length // self.side
            axes.append(np.arange(self.side) * patch + max(patch - 1, 0) // 2)
        return (axes[0][:, None] * scale.width + axes[1]).reshape(-1).astype(np.int32)

    def scores(
        self, k: Float[Array, "R H S D"], raw: Float[Array, "R2 H T D"], place: Place
    ) -> Float[Array, "R H S"]:
        """How much the window's raw queries want every row; neighbours share the largest.

        Rows of the window itself score infinitely: they stay.
        """
        window = self.window(place)
        queries = raw[:, :, window].astype(jnp.float32).sum(2)
        dot = jnp.einsum("rhd,rhsd->rhs", queries, k[: len(raw)], precision="highest")
        own = place.rows.spans[place.index].start + window
        score = (dot / k.shape[3] ** 0.5).at[:, :, own].set(-jnp.inf)
        around = (1, 1, self.pool)
        best = jax.lax.reduce_window(score, -jnp.inf, jax.lax.max, around, (1, 1, 1), "SAME")
        return best.at[:, :, own].set(jnp.inf)

    def choose(
        self, scores: Float[Array, "R H S"], count: int, place: Place
    ) -> Int[Array, "R H K"]:
        """The rows that stay, ascending."""
        return jnp.sort(jax.lax.top_k(scores, count)[1], axis=-1)


@checked
def scalekv(
    preset: str | None = None, *, keep: float = 0.1, drafters: tuple[int, ...] = (0,)
) -> Policy:
    """A budget of cache rows a layer, as ScaleKV: for memory, not for time.

    preset: "2b" or "8b", the published table of the square schedule. Without one, `drafters` keep
    everything and all other layers the share `keep` of the rows so far, once more than 650 are
    cached. Later policies that need grids of keys are refused by the row map.
    """
    if preset is not None and preset not in PUBLISHED:
        raise ValueError(f"scalekv has the presets {' and '.join(PUBLISHED)}, got {preset!r}")
    if not 0 < keep <= 1:
        raise ValueError(f"scalekv keeps a share of the rows in (0, 1], got {keep}")

    def apply(plan: Plan) -> Plan:
        stores = {
            layer: ScaleKv(
                _published(preset, layer, len(plan.schedule))
                if preset
                else _share(plan, keep, layer in drafters)
            )
            for layer in range(plan.depth)
        }

        def change(step: Step, layer: int, old: Segment) -> Segment:
            if old.store != Full():
                raise ValueError(
                    f"layer {layer}: scalekv would replace the store {old.store.name}; a layer "
                    "keeps one store"
                )
            return dataclasses.replace(old, store=stores[layer])

        return map_segments(plan, change)

    return apply


def _published(preset: str, layer: int, scales: int) -> tuple[tuple[int, int], ...]:
    drafter, refiner, until = PUBLISHED[preset]
    return tuple(
        (scale, (drafter if scale < until.get(layer, 0) else refiner)[scale])
        for scale in drafter
        if scale + 1 < scales
    )


def _share(plan: Plan, keep: float, drafter: bool) -> tuple[tuple[int, int], ...]:
    """Budgets by share; the rows that a scale adds count whole until it is over."""
    if drafter or keep == 1:
        return ()
    late = [scale for scale in plan.schedule.scales[:-1] if scale.end > FIRST_ROWS]
    return tuple((scale.index, max(round(keep * scale.end), 16)) for scale in late)
