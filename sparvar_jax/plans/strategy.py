"""What a plan puts in a segment of layers: an attention and a token rule.

A strategy is a frozen, hashable dataclass with a pure `__call__`. Whatever it computes at one scale
and needs at the next travels in a layer's state, a flat dict of arrays with named entries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels.api import Implementation
from sparvar_jax.plans.schedule import Layout, LayoutName, Scale, ScaleSchedule

LayerState = Mapping[str, jax.Array]
"""Named arrays one layer carries from scale to scale; rows lead every array."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a step stands: the schedule, the cache layout and the index of the scale drawn.

    logit_bound: what the model promises its attention logits never exceed, None for no promise.
    hidden_finite: whether cache rows without tokens are known to hold finite numbers.
    """

    schedule: ScaleSchedule
    layout_name: LayoutName
    index: int
    logit_bound: float | None = None
    hidden_finite: bool = False

    @property
    def scale(self) -> Scale:
        return self.schedule.scales[self.index]

    @property
    def layout(self) -> Layout:
        return self.schedule.layout(self.layout_name)

    @property
    def kv_length(self) -> int:
        """Physical cache rows in use, this scale included."""
        return self.layout.filled(self.index)

    @property
    def dense_pairs(self) -> int:
        """(query, key) pairs of dense attention, per head and row."""
        return self.scale.tokens * self.scale.end


@runtime_checkable
class Attention(Protocol):
    """How the queries of one scale meet the cache.

    name: short, for tables. layouts: cache layouts it can read. reads, writes: the entries of the
    layer state it needs and leaves. `pairs` counts the kept (query, key) pairs per head and row.
    """

    @property
    def name(self) -> str: ...
    @property
    def layouts(self) -> tuple[LayoutName, ...]: ...
    @property
    def reads(self) -> frozenset[str]: ...
    @property
    def writes(self) -> frozenset[str]: ...

    def pairs(self, place: Place) -> float: ...

    def __call__(
        self,
        q: Float[Array, "R H T D"],
        k: Float[Array, "Rk H S D"],
        v: Float[Array, "Rk H S D"],
        place: Place,
        state: LayerState,
    ) -> tuple[Float[Array, "R H T D"], dict[str, jax.Array]]:
        """The attention output and the state entries it leaves.

        The cache holds this scale already, may have more rows than q (the first are meant), and
        its length S counts allocated rows. The softmax scale is 1: models scale their queries.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Dense:
    """Attention over every cached token."""

    implementation: Implementation | None = None

    @property
    def name(self) -> str:
        return "dense"

    @property
    def layouts(self) -> tuple[LayoutName, ...]:
        return ("packed", "aligned")

    @property
    def reads(self) -> frozenset[str]:
        return frozenset()

    @property
    def writes(self) -> frozenset[str]:
        return frozenset()

    def pairs(self, place: Place) -> float:
        return float(place.dense_pairs)

    def __call__(
        self,
        q: Float[Array, "R H T D"],
        k: Float[Array, "Rk H S D"],
        v: Float[Array, "Rk H S D"],
        place: Place,
        state: LayerState,
    ) -> tuple[Float[Array, "R H T D"], dict[str, jax.Array]]:
        """Dense attention over the filled, valid rows; leaves no state."""
        del state
        out = pallas_kernels.attention(
            q,
            k,
            v,
            place.kv_length,
            gaps=place.layout.gaps(place.index),
            logit_bound=place.logit_bound,
            hidden_finite=place.hidden_finite,
            implementation=self.implementation,
        )
        assert isinstance(out, jax.Array)
        return out, {}


@runtime_checkable
class TokenRule(Protocol):
    """Which tokens of a scale enter a segment's branches, and how the rest is restored."""

    @property
    def name(self) -> str: ...

    def tokens(self, place: Place) -> int: ...


@dataclasses.dataclass(frozen=True)
class AllTokens:
    """Every token enters every branch."""

    @property
    def name(self) -> str:
        return "all"

    def tokens(self, place: Place) -> int:
        return place.scale.tokens
