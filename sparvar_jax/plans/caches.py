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

    Raises ValueError for an unknown kind.
    """
    check_cache(cache)
    return plan if cache == "full" else _with_cache(plan, plan.name, cache)


@functools.lru_cache(maxsize=64)  # equal plans may differ in name
def _with_cache(plan: Plan, name: str, cache: str) -> Plan:
    del name

    def change(step: Step, layer: int, old: Segment) -> Segment:
        if old.store != Full():
            return old
        return dataclasses.replace(old, store=CACHES[cache])

    return map_segments(plan, change)
