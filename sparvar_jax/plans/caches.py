"""The kinds of key/value cache that a call can ask for, by name."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, get_args

from sparvar_jax.plans.eight_bits import EightBits
from sparvar_jax.plans.lean import Lean
from sparvar_jax.plans.plan import Plan, map_segments
from sparvar_jax.plans.segments import Segment, Step
from sparvar_jax.plans.stores import Full, Store

Cache = Literal["lean", "int8", "full"]
"""lean: what a later scale reads. int8: the same in 8 bits. full: every row of every layer."""
CACHES: dict[str, Store] = {"lean": Lean(), "int8": EightBits(), "full": Full()}


def check_cache(cache: str) -> None:
    """ValueError for a kind of cache that there is not."""
    if cache not in CACHES:
        raise ValueError(f"cache must be {' or '.join(get_args(Cache))}, got {cache!r}")


def with_cache(plan: Plan, cache: str) -> Plan:
    """The plan with that kind of cache in every layer that has no store of its own.

    Plans of a route share one cache: it keeps what any of them reads. Raises ValueError for an
    unknown kind, and for 8 bits where a store of the plan's own would stay in 16 or 32.
    """
    check_cache(cache)
    return plan if cache == "full" else _with_cache(plan, plan.name, cache)


@functools.lru_cache(maxsize=64)  # equal plans may differ in name
def _with_cache(plan: Plan, name: str, cache: str) -> Plan:
    del name
    store = CACHES[cache]
    for segment in plan.steps[0].segments:
        if store.name == "int8" and segment.store not in (Full(), store):
            raise ValueError(
                f"layers {segment.layers[0]}..{segment.layers[1]} of the plan {plan.name} keep "
                f"their own store ({segment.store.name}), which is not in 8 bits: take the cache "
                "lean or full, or a plan without it"
            )

    def change(step: Step, layer: int, old: Segment) -> Segment:
        return dataclasses.replace(old, store=store) if old.store == Full() else old

    if plan.route is None:
        return map_segments(plan, change)
    plans = tuple(map_segments(other, change) for other in plan.route.plans)
    shared = [_joined([other.store(layer) for other in plans]) for layer in range(plan.depth)]

    def share(step: Step, layer: int, old: Segment) -> Segment:
        return dataclasses.replace(old, store=shared[layer])

    plans = tuple(map_segments(other, share) for other in plans)
    return dataclasses.replace(plans[0], route=dataclasses.replace(plan.route, plans=plans))


def _joined(stores: list[Store]) -> Store:
    """What one layer keeps where any of several plans may go on."""
    first, *others = stores
    for other in others:
        if isinstance(first, Lean) and isinstance(other, Lean):
            first = first.joined(other)
    return first
