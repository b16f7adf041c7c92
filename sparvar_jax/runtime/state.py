"""What scales hand to each other, as values, and what it is before the first one."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from sparvar_jax.models.family import ScaleModel
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.rows import RowMap
from sparvar_jax.plans.stores import CacheShape, Store


@typing.no_type_check  # jax rebuilds it with whatever stands for arrays
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What one scale hands to the next; its buffers are updated in place, so use it once.

    cache: what the store of every layer keeps. shared: buffers that the layers of one store hand on
    to each other. strategies: the layer state of every layer. code_sum: accumulated codes on the
    final latent grid. codes: the next scale's input codes.
    """

    cache: tuple[Any, ...]
    shared: tuple[Any, ...]
    strategies: tuple[dict[str, jax.Array], ...]
    code_sum: Float[Array, "B height width Cd"]
    codes: Float[Array, "B T N"] | None


@typing.no_type_check
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScaleOutput:
    """What one scale drew.

    tokens: labels or ids. captured: inner arrays, if asked for. reports: of every layer, what its
    attention reports.
    """

    tokens: Shaped[Array, "B T ..."]
    captured: dict[str, jax.Array]
    reports: tuple[dict[str, jax.Array], ...] = ()


def pools(plan: Plan) -> tuple[Store, ...]:
    """The stores of a plan, each once, in the order of layers."""
    return tuple(dict.fromkeys(plan.store(layer) for layer in range(plan.depth)))


def empty_state(
    model: ScaleModel,
    plan: Plan,
    batch: int,
    buffers: tuple[Any, Any] | None = None,
    code_sum: jax.Array | None = None,
) -> State:
    """The state before the first scale: empty caches and an empty code sum.

    buffers: (cache, shared) of an earlier generation to use again; a step reads rows only after
    writing them. code_sum: an empty one that is there already.
    """
    if buffers is None:
        config, rows = model.config, batch * plan.row_factor
        shape = CacheShape(rows, config.heads, config.head_dim, config.precision.compute)
        buffers = empty_buffers(plan, shape)
    strategies: tuple[dict[str, jax.Array], ...] = tuple({} for _ in range(plan.depth))
    if code_sum is None:
        code_sum = model.start_codes(batch, plan.schedule)
    return State(*buffers, strategies, code_sum, None)


def empty_buffers(plan: Plan, shape: CacheShape) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(what every layer keeps, what layers share) before the first scale."""
    layers = range(plan.depth)
    wholes: dict[Store, list[RowMap]] = {store: [] for store in pools(plan)}
    for layer in layers:
        wholes[plan.store(layer)].append(plan.whole_rows(layer))
    return (
        tuple(plan.store(layer).start(shape, plan.whole_rows(layer)) for layer in layers),
        tuple(store.shared(shape, tuple(maps)) for store, maps in wholes.items()),
    )


def split_state(state: State) -> tuple[Any, Any]:
    """The buffers a step updates in place, to be donated, and what it only reads."""
    return (state.cache, state.shared, state.code_sum), (state.strategies, state.codes)
