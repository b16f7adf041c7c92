"""What a plan puts in a segment of layers: an attention, a token rule and a store.

Each is a frozen, hashable dataclass with pure methods. Whatever it computes at one scale and needs
at the next travels in a layer's state, a flat dict of arrays with named entries.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import jax
from jaxtyping import Array, Bool, Float, Int

import pallas_kernels
from pallas_kernels.api import Implementation
from sparvar_jax.plans.rows import LayoutName, RowMap
from sparvar_jax.plans.schedule import Scale, ScaleSchedule

LayerState = Mapping[str, jax.Array]
"""Named arrays one layer carries from scale to scale: rows lead every array, heads follow."""
KEPT = "kept tokens"
"""The state entry in which an attention finds the tokens that its segment's rule chose, [R, T2]."""


@typing.no_type_check  # rows are None until they are filled in
@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer stands: the schedule, the index of the scale drawn, and its cache rows.

    rows: what is where in the cache that attention sees; None is the map of the named layout, and
    is replaced by it. kept: how many tokens of the scale run in this layer, None for all.
    logit_bound: what the model promises its attention logits never exceed, None for no promise.
    hidden_finite: whether cache rows without tokens are known to hold finite numbers.
    """

    schedule: ScaleSchedule
    layout_name: LayoutName
    index: int
    logit_bound: float | None = None
    hidden_finite: bool = False
    rows: RowMap = None  # type: ignore[assignment]
    kept: int | None = None

    def __post_init__(self):
        if self.rows is None:
            object.__setattr__(self, "rows", self.schedule.layout(self.layout_name))

    @property
    def scale(self) -> Scale:
        return self.schedule.scales[self.index]

    @property
    def queries(self) -> int:
        """Tokens of this scale that run in this layer."""
        return self.scale.tokens if self.kept is None else self.kept

    @property
    def kv_length(self) -> int:
        """Physical cache rows in use, this scale included."""
        return self.rows.filled(self.index)

    @property
    def gaps(self) -> tuple[tuple[int, int], ...]:
        """The [start, stop) ranges of rows in use that hold no token."""
        return self.rows.gaps(self.index)

    @property
    def dense_pairs(self) -> int:
        """(query, key) pairs of attention to everything the cache holds, per head and row."""
        return self.queries * self.rows.tokens(self.index)


class View(NamedTuple):
    """What a store shows of one layer's cache: its place's row map says which row is what.

    There may be more rows than queries: the first are meant. S counts allocated cache rows.
    """

    k: Float[Array, "Rk H S D"]
    v: Float[Array, "Rk H S D"]


class Output(NamedTuple):
    """What an attention gives: its result, the state entries it leaves, and what it reports.

    report: arrays for whoever observes a generation, rows first and heads second as in a state;
    nothing of it enters the picture.
    """

    out: Float[Array, "R H T D"]
    state: Mapping[str, jax.Array] = {}
    report: Mapping[str, jax.Array] = {}


@runtime_checkable
class UsesState(Protocol):
    """What is told of all that works on the state of a layer.

    name: short, for tables. reads, writes: the entries of the state that it needs and leaves.
    """

    @property
    def name(self) -> str: ...
    @property
    def reads(self) -> frozenset[str]: ...
    @property
    def writes(self) -> frozenset[str]: ...


@runtime_checkable
class Attention(UsesState, Protocol):
    """How the queries of one scale meet the cache.

    layouts: row maps it can read, by name. `pairs` counts the kept (query, key) pairs per head and
    row; `scales` names the scales whose rows it looks at.
    """

    @property
    def layouts(self) -> tuple[LayoutName, ...]: ...

    def pairs(self, place: Place) -> float: ...

    def scales(self, place: Place) -> frozenset[int]: ...

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """The attention output. The view holds this scale already.

        The softmax scale is 1: models scale their queries.
        """
        ...


class ReadsAll:
    """An attention that looks at every scale up to its own, and keeps no state unless told."""

    layouts: tuple[LayoutName, ...] = ("packed", "aligned")
    reads: frozenset[str] = frozenset()
    writes: frozenset[str] = frozenset()

    def pairs(self, place: Place) -> float:
        return float(place.dense_pairs)

    def scales(self, place: Place) -> frozenset[int]:
        return frozenset(range(place.index + 1))


@dataclasses.dataclass(frozen=True)
class Dense(ReadsAll):
    """Attention over every cached token."""

    implementation: Implementation | None = None

    @property
    def name(self) -> str:
        return "dense"

    @property
    def layouts(self) -> tuple[LayoutName, ...]:  # type: ignore[override]
        return ("packed", "aligned", "traced")

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """Dense attention over the filled, valid rows; leaves no state."""
        del state
        out = pallas_kernels.attention(
            q,
            view.k,
            view.v,
            place.kv_length,
            gaps=place.gaps,
            logit_bound=place.logit_bound,
            hidden_finite=place.hidden_finite,
            implementation=self.implementation,
        )
        assert isinstance(out, jax.Array)
        return Output(out)


@runtime_checkable
class TokenRule(UsesState, Protocol):
    """Which tokens of a scale run in a segment's layers, and how the others are restored.

    It reads and writes the state of the segment's first layer.
    """

    def tokens(self, place: Place) -> int | None:
        """How many tokens run: static, the cache is allocated for them. None for all of them."""
        ...

    def select(
        self,
        x: Float[Array, "R T C"],
        codes: Float[Array, "B T N"] | None,
        place: Place,
        state: LayerState,
    ) -> Int[Array, "R T2"] | None:
        """Which tokens run, in the order of their places; None for all of them.

        x: the residual stream. codes: the input codes of the scale, None at the first.
        """
        ...

    def restore(
        self,
        before: Float[Array, "R T C"],
        after: Float[Array, "R T2 C"],
        kept: Int[Array, "R T2"],
        place: Place,
        state: LayerState,
    ) -> tuple[Float[Array, "R T C"], Mapping[str, jax.Array]]:
        """The residual stream of all tokens after the segment, and the state entries it leaves."""
        ...


@runtime_checkable
class Watches(Protocol):
    """A token rule that leaves something of a scale that it runs whole."""

    def watch(
        self, x: Float[Array, "R T C"], codes: Float[Array, "B T N"] | None, place: Place
    ) -> Mapping[str, jax.Array]:
        """State entries from what enters the segment; see `TokenRule.select`."""
        ...


@runtime_checkable
class DrawsSome(Protocol):
    """A token rule after which only some tokens add codes to the picture."""

    def drawn(
        self, kept: Int[Array, "R T2"], place: Place, batch: int
    ) -> Bool[Array, "B T"] | None:
        """The tokens whose codes count, None for all; others add nothing to the code sum."""
        ...


@dataclasses.dataclass(frozen=True)
class AllTokens:
    """Every token runs in every layer."""

    name = "all"
    reads = frozenset[str]()
    writes = frozenset[str]()

    def tokens(self, place: Place) -> None:
        return None

    def select(
        self,
        x: Float[Array, "R T C"],
        codes: Float[Array, "B T N"] | None,
        place: Place,
        state: LayerState,
    ) -> None:
        return None

    def restore(
        self,
        before: Float[Array, "R T C"],
        after: Float[Array, "R T C"],
        kept: Int[Array, "R T"],
        place: Place,
        state: LayerState,
    ) -> tuple[Float[Array, "R T C"], Mapping[str, jax.Array]]:
        return after, {}
