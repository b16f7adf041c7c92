"""Per-head sight: which earlier scales a head still sees, and a cache that holds those alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

import pallas_kernels
from pallas_kernels.api import Implementation
from sparvar_jax.plans.plan import Plan, Segment, Step, map_segments
from sparvar_jax.plans.rows import RowMap, Slot
from sparvar_jax.plans.stores import CacheShape, Full, Write
from sparvar_jax.plans.strategy import Dense, LayerState, Output, Place, ReadsAll, View
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.head_orders import HeadOrders, hidden, read_orders
from sparvar_jax.policies.routing import Policy

Sight = tuple[tuple[int, ...], ...]
"""For every head the scales that it sees, ascending; its own scale is always among them."""


@dataclasses.dataclass(frozen=True)
class PerHead(ReadsAll):
    """Dense attention of every head to the scales it sees; heads that see alike go together."""

    sight: Sight
    implementation: Implementation | None = None

    @property
    def name(self) -> str:
        return "per head"

    def pairs(self, place: Place) -> float:
        tokens = [span.tokens for span in place.rows.spans]
        keys = [sum(tokens[scale] for scale in seen) for seen in self.sight]
        return float(place.queries * np.mean(keys))

    def scales(self, place: Place) -> frozenset[int]:
        return frozenset().union(*self.sight)

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """The attention output; leaves no state. Needs all heads on one device."""
        if q.shape[1] != len(self.sight):
            raise ValueError(
                f"per_head was made for {len(self.sight)} heads a layer, this device holds "
                f"{q.shape[1]}: take an order of this model, and a mesh that leaves heads whole"
            )
        everything = tuple(range(place.index + 1))
        if set(self.sight) == {everything}:
            dense = Dense(self.implementation)(view, q, place, {})
            return dense
        out = jnp.zeros_like(q)
        for seen in dict.fromkeys(self.sight):
            heads = np.flatnonzero([other == seen for other in self.sight])
            keys, values = (_rows_of(x[:, heads], seen, place.rows) for x in view)
            part = pallas_kernels.attention(
                q[:, heads],
                keys,
                values,
                keys.shape[2],
                logit_bound=place.logit_bound,
                implementation=self.implementation,
            )
            out = out.at[:, heads].set(part)
        return Output(out)


def _rows_of(x: Float[Array, "R H S D"], scales: tuple[int, ...], rows: RowMap) -> jax.Array:
    """The cached tokens of some scales, one after the other, without padding."""
    physical = rows.physical(scales[-1])
    ends = np.cumsum([span.tokens for span in rows.spans])
    kept = np.concatenate([physical[ends[s] - rows.spans[s].tokens : ends[s]] for s in scales])
    return x[:, :, kept]


@dataclasses.dataclass(frozen=True)
class HeadStore(Full):
    """Keys and values of every scale for those heads alone that will see them.

    needed: for every step the source scale -> heads that still see it later.
    """

    needed: tuple[tuple[tuple[int, ...], ...], ...] = ()

    name = "per head"

    def start(self, shape: CacheShape, whole: RowMap) -> tuple[View, ...]:
        return (View(shape.buffer(0), shape.buffer(0)),)

    def write(self, kept: Any, shared: Any, write: Write, place: Place) -> tuple[jax.Array, Any]:
        span, empty = place.rows.spans[place.index], kept[0].k
        room = jnp.zeros((*empty.shape[:2], span.rows, empty.shape[3]), empty.dtype)
        q, *new = write(room, room, Slot(0, span.size[1], span.pitch))
        return q, (*kept, View(*new))

    def view(self, held: Any, place: Place) -> View:
        """All heads of all scales, with zeros where a head gave a scale up."""
        spans, new = place.rows.spans, held[-1].k
        shape = (*new.shape[:2], place.rows.total, new.shape[3])
        out = (jnp.zeros(shape, new.dtype), jnp.zeros(shape, new.dtype))
        for scale, part in enumerate(held[1:]):
            heads = self._heads(scale, place.index, new.shape[1])
            if len(heads):
                rows = slice(spans[scale].start, spans[scale].stop)
                both = zip(out, part, strict=True)
                out = tuple(x.at[:, heads, rows].set(y) for x, y in both)
        return View(*out)

    def _heads(self, scale: int, index: int, heads: int) -> np.ndarray:
        """Heads whose rows of a scale are there while scale `index` is drawn."""
        if scale == index:
            return np.arange(heads)
        return np.asarray(self.needed[index - 1][scale], int)

    def keep(self, held: Any, q: Float[Array, "R H T D"], place: Place) -> tuple[Any, Any]:
        left = []
        for scale, part in enumerate(held[1:]):
            before = self._heads(scale, place.index, held[-1].k.shape[1])
            chosen = np.flatnonzero(np.isin(before, self.needed[place.index][scale]))
            left.append(part if len(chosen) == len(before) else View(*(x[:, chosen] for x in part)))
        return (held[0], *left), ()


@checked
def per_head(order: str, budget: float = 0.1, *, free: bool = True) -> Policy:
    """HeatKV's schedule: heads that attend least to an earlier scale stop seeing it.

    order: "infinity_2b" or "infinity_8b", as published with HeatKV, or a file of
    `sparvar head-order`. budget: kept share of the cache rows of all scales but the last. free:
    give the rows up too, not only the sight of them.
    """
    if not 0 < budget <= 1:
        raise ValueError(f"per_head keeps a share of the rows in (0, 1], got {budget}")
    orders = read_orders(order)
    return lambda plan: with_orders(plan, orders, budget, free=free)


def with_orders(plan: Plan, orders: HeadOrders, budget: float, *, free: bool = True) -> Plan:
    """The plan in which every head sees what orders and a budget leave it.

    Raises ValueError for orders of another depth, or where a layer is not dense or stores apart.
    """
    scales = len(plan.schedule)
    if orders.layers != plan.depth or orders.sinks + len(orders.orders) < scales - 1:
        raise ValueError(
            f"the order is of {orders.layers} layers and source scales up to "
            f"{orders.sinks + len(orders.orders) - 1}, the model has {plan.depth} layers and "
            f"{scales} scales: take an order made for this model"
        )
    blind = [hidden(orders, plan.schedule, budget, scale) for scale in range(scales)]

    sights = [
        [_sight(seen[:, layer], orders.sinks, scale) for scale, seen in enumerate(blind)]
        for layer in range(orders.layers)
    ]

    def change(step: Step, layer: int, old: Segment) -> Segment:
        if not isinstance(old.attention, Dense) or old.store != Full():
            raise ValueError(
                f"scale {step.scale.index}, layer {layer}: per_head needs dense attention and the "
                f"full store, got {old.attention.name} and {old.store.name}: it decides for both"
            )
        attention = PerHead(sights[layer][step.scale.index], old.attention.implementation)
        return dataclasses.replace(old, attention=attention, store=stores[layer])

    stores = [HeadStore(_needed(own)) if free else Full() for own in sights]
    return map_segments(plan, change)


def _sight(blind: Bool[np.ndarray, "sources heads"], sinks: int, scale: int) -> Sight:
    """What every head of a layer sees while a scale is drawn."""
    early = tuple(range(min(sinks, scale)))
    late = range(sinks, scale)
    return tuple(
        (*early, *(source for source in late if not blind[source - sinks, head]), scale)
        for head in range(blind.shape[1])
    )


def _needed(sights: list[Sight]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    """After every scale: for every scale so far, the heads that the next one lets see it.

    What a head stops seeing it never sees again, so the next scale says it for all later ones.
    """
    found = []
    for step, following in enumerate([*sights[1:], ((),) * len(sights[0])]):
        seen = [[head for head, own in enumerate(following) if s in own] for s in range(step + 1)]
        found.append(tuple(tuple(heads) for heads in seen))
    return tuple(found)
