"""CSLA: cross-scale local attention (SparVAR). A query sees the sinks and, in every other scale,
the window around its own place. Two forms: raster blocks, as released, and rectangles ("boxes").
"""

from __future__ import annotations

import dataclasses
from typing import Literal, TypedDict

import jax
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import boxes_table, sparsity
from pallas_kernels.api import Implementation
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.rows import LayoutName
from sparvar_jax.plans.strategy import LayerState, Output, Place, ReadsAll, View
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.indices import scale_index
from sparvar_jax.policies.routing import Layers, Policy, assign

Form = Literal["blocks", "boxes"]
WINDOWS = (-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 3, 5, 7)
"""The released windows, one a key scale; shorter schedules take them from the end."""
SINKS = 5


class CslaOptions(TypedDict, total=False):
    """Arguments of `csla` that policies made of it pass on."""

    windows: tuple[int, ...]
    sinks: int
    form: Form
    exact: bool
    block: int


@dataclasses.dataclass(frozen=True)
class Csla(ReadsAll):
    """Cross-scale local attention of one scale.

    windows: one a key scale, counted from the schedule's end; w sees w // 2 to each side of the
        centre, -1 sees nothing. sinks: leading scales that every query sees.
    form: "blocks" keeps whole raster blocks of `block` tokens; "boxes" keeps, for patches of 8x16
        queries, the rectangles around their windows. exact: boxes keep the token rule alone.
    """

    windows: tuple[int, ...] = WINDOWS
    sinks: int = SINKS
    form: Form = "blocks"
    block: int = 128
    exact: bool = False
    implementation: Implementation | None = None

    def __post_init__(self):
        if self.form not in ("blocks", "boxes"):
            raise ValueError(f"form must be 'blocks' or 'boxes', got {self.form!r}")
        if self.exact and self.form == "blocks":
            raise ValueError("exact windows need form='boxes': blocks keep every key they touch")
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128, got {self.block}")
        if self.sinks < 0 or not self.windows:
            raise ValueError(f"need windows and sinks >= 0, got {self.windows} and {self.sinks}")

    @property
    def name(self) -> str:
        exact = " exact" if self.exact else ""
        return f"csla blocks {self.block}" if self.form == "blocks" else f"csla boxes{exact}"

    @property
    def layouts(self) -> tuple[LayoutName, ...]:  # type: ignore[override]
        return ("packed",) if self.form == "blocks" else ("aligned", "packed")

    def at(self, place: Place) -> tuple[sparsity.Geometry, tuple[int, ...], int]:
        """(geometry, one window a key grid, leading sink grids) of the scale drawn."""
        windows = windows_of(self.windows, len(place.schedule))[: place.index + 1]
        sinks = max(self.sinks, int(place.schedule.prefix))  # a prefix has no places to be near
        return geometry_of(place), windows, min(sinks, place.index + 1)

    def scales(self, place: Place) -> frozenset[int]:
        """Boxes read the sinks and the windows alone; blocks touch their neighbours."""
        if self.form == "blocks":
            return super().scales(place)
        _, windows, sinks = self.at(place)
        return frozenset(i for i, window in enumerate(windows) if i < sinks or window >= 0)

    def pairs(self, place: Place) -> float:
        geometry, windows, sinks = self.at(place)
        if self.form == "blocks":
            blocks = sparsity.csla_blocks(geometry, windows, sinks, self.block, self.block)
            return sparsity.density(blocks, place.scale.tokens) * place.dense_pairs
        if self.exact:
            return token_pairs(geometry, windows, sinks)
        table = boxes_table.tile_keys(geometry, windows, sinks)
        tiles = boxes_table.tile_queries(geometry, table.tile_height, table.tile_width)
        queries = (tiles < place.scale.tokens).sum(1)
        return float((table.valid.sum(1) * queries).sum())

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """Attention under the windows; leaves no state."""
        del state
        geometry, windows, sinks = self.at(place)
        if self.form == "boxes":
            out = pallas_kernels.window_attention(
                q, *view, geometry, windows, sinks,
                exact=self.exact, implementation=self.implementation,
                logit_bound=place.logit_bound,
            )  # fmt: skip
            return Output(out)
        blocks = sparsity.csla_blocks(geometry, windows, sinks, self.block, self.block)
        out = pallas_kernels.block_sparse_attention(
            q, *view, blocks, implementation=self.implementation,
            logit_bound=place.logit_bound, hidden_finite=place.hidden_finite,
        )  # fmt: skip
        assert isinstance(out, jax.Array)
        return Output(out)


@checked
def csla(
    windows: tuple[int, ...] = WINDOWS,
    sinks: int = SINKS,
    form: Form = "blocks",
    exact: bool = False,
    *,
    block: int = 128,
    first_scale: int | float = -3,
    layers: Layers = None,
) -> Policy:
    """Cross-scale local attention from `first_scale` on, in the given layers.

    Boxes move the plan to the aligned cache layout; blocks need the packed one.
    """
    attention = Csla(tuple(windows), sinks, form, block, exact)

    def apply(plan: Plan) -> Plan:
        first = scale_index(plan.schedule, first_scale)
        return assign(
            plan,
            layers,
            lambda index: attention if index >= first else None,
            layout="aligned" if form == "boxes" else None,
        )

    return apply


def windows_of(windows: tuple[int, ...], count: int) -> tuple[int, ...]:
    """One window for each of `count` scales, counted from the end; missing ones see nothing."""
    return ((-1,) * count + windows)[-count:]


def geometry_of(place: Place) -> sparsity.Geometry:
    """The kernels' view of the scale drawn and of every scale in the cache."""
    keys = tuple(
        sparsity.KeyGrid(*span.size, span.start, span.pitch)
        for span in place.rows.spans[: place.index + 1]
    )
    return sparsity.Geometry(place.scale.height, place.scale.width, keys)


def token_pairs(geometry: sparsity.Geometry, windows: tuple[int, ...], sinks: int) -> float:
    """(query, key) pairs of the token rule: windows are products of two axes."""
    total = 0
    for number, (grid, window) in enumerate(zip(geometry.keys, windows, strict=True)):
        seen = 1
        for length, keys in ((geometry.height, grid.height), (geometry.width, grid.width)):
            bounds = boxes_table.axis_bounds(length, keys, window, number < sinks)
            seen *= int(np.maximum(bounds[:, 1] - bounds[:, 0] + 1, 0).sum())
        total += seen
    return float(total)
