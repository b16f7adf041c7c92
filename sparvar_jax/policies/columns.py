"""The key lists of CS4A: selection, their way from scale to scale, and the upsampled output cache.

A list holds units: single cache rows, or runs of 8 rows counted from row 0. What is known at trace
time (local runs, group maps, sinks) is numpy; only the chosen units are traced.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.api import Implementation
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import indices

Mapping = Literal["keep", "scale", "relative"]


@dataclasses.dataclass(frozen=True)
class Selection:
    """How columns are chosen at the decision scale; a prefix of text is kept beside them.

    keep: share of the keys; rounded half-even to `multiple` keys. group: queries that share a
    list. granularity: keys a unit, 1 or 8. ranked: heaviest first instead of ascending.
    """

    keep: float = 0.2
    group: int = 192
    multiple: int = 112
    granularity: int = 1
    ranked: bool = False

    def __post_init__(self):
        if not 0 < self.keep <= 1:
            raise ValueError(f"keep must be a share in (0, 1], got {self.keep}")
        if self.granularity not in (1, 8):
            raise ValueError(f"granularity must be 1 or 8, got {self.granularity}")
        if self.multiple < 1 or self.multiple % self.granularity:
            raise ValueError(
                f"multiple must be a positive multiple of the granularity {self.granularity}, "
                f"got {self.multiple}"
            )
        if self.group < 1:
            raise ValueError(f"group must be positive, got {self.group}")

    def units(self, place: Place) -> int:
        """How many whole units each group keeps at the decision scale."""
        text = place.schedule.text
        whole = place.kv_length // self.granularity - len(self.text(place))
        if self.keep >= 1:
            return whole
        count = indices.kept_count(place.scale.end - text, self.keep, self.multiple)
        return min(max(count // self.granularity, 1), whole)

    def text(self, place: Place) -> Int[np.ndarray, "n"]:
        """The units that hold a prefix of text: they lead, and are kept without being chosen."""
        return np.arange(indices.ceil_div(place.schedule.text, self.granularity))

    def border(self, place: Place) -> Int[np.ndarray, "n"]:
        """The unit that the decision scale shares with the next one, if any.

        It is never chosen but always kept: so no list can name it twice.
        """
        first = place.kv_length // self.granularity
        return np.arange(first, indices.ceil_div(place.kv_length, self.granularity))

    def fixed(self, place: Place) -> Int[np.ndarray, "n"]:
        """The units that every list of the decision scale holds."""
        return np.union1d(self.text(place), self.border(place))


@dataclasses.dataclass(frozen=True)
class Reuse:
    """How a later scale makes its lists from what scale `decision` chose.

    windows: local windows counted from the schedule's end. mapping: "keep" leaves units where they
    are, "scale" applies floor(S_k / S_d * index), "relative" moves them on by as many scales as
    the decision lies back. sinks: leading scales that "relative" always keeps.
    """

    decision: int
    selection: Selection = Selection()
    windows: tuple[int, ...] = (7, 9)
    mapping: Mapping = "keep"
    sinks: int = 5

    def __post_init__(self):
        if self.mapping not in ("keep", "scale", "relative"):
            raise ValueError(f"mapping must be keep, scale or relative, got {self.mapping!r}")
        if not self.windows or self.sinks < 0:
            raise ValueError(f"need a window and sinks >= 0, got {self.windows} and {self.sinks}")

    def chosen(self, place: Place) -> int:
        """How many units the decision scale handed on for every group."""
        return self.selection.units(self.source(place))

    def source(self, place: Place) -> Place:
        """The decision scale's place."""
        return dataclasses.replace(place, index=self.decision)


def select(
    sums: Float[Array, "R H G S"],
    selection: Selection,
    place: Place,
    implementation: Implementation | None = None,
) -> Int[Array, "R H G K"]:
    """The heaviest whole units of every group, from sums over the filled cache rows."""
    size, first = selection.granularity, len(selection.text(place))
    whole = place.kv_length // size
    sums = sums[..., first * size : whole * size]
    count = selection.units(place)
    if selection.ranked:
        mass = sums.reshape(*sums.shape[:-1], whole - first, size).sum(-1)
        return jax.lax.top_k(mass, count)[1].astype(jnp.int32) + first
    chosen = pallas_kernels.select_columns(
        sums, count, granularity=size, implementation=implementation
    )
    return chosen + first if first else chosen


def at_decision(
    chosen: Int[Array, "R H G K"], selection: Selection, place: Place
) -> tuple[Int[Array, "R H G K2"], int]:
    """(lists, count) of the decision scale itself: the chosen units, the text and the border."""
    fixed = selection.fixed(place).astype(np.int32)
    extra = jnp.broadcast_to(fixed, (*chosen.shape[:-1], len(fixed)))
    return jnp.concatenate([chosen, extra], -1), chosen.shape[-1] + len(fixed)


def at_later_scale(
    chosen: Int[Array, "R H G K"], reuse: Reuse, place: Place
) -> tuple[Int[Array, "R H G2 K2"], Int[Array, "#R #H G2"]]:
    """(lists, counts) of a scale after the decision.

    Mapping "keep": chosen units unchanged, then the local runs of every scale since the decision.
    "scale" and "relative": this scale's run, the sinks ("relative" only), then the mapped units,
    heaviest first where ranked; repeats are dropped and the list is cut at its static capacity.
    A prefix of text is in every list.
    """
    selection = reuse.selection
    chosen = chosen[:, :, group_source(place, reuse.decision, selection.group)]
    fixed, counts = fixed_units(place, reuse)
    lead = (*chosen.shape[:2], *fixed.shape)
    if reuse.mapping == "keep":
        columns = jnp.concatenate([chosen, jnp.broadcast_to(fixed, lead)], -1)
        return columns, jnp.asarray(chosen.shape[-1] + counts)[None, None]
    mapped = jnp.asarray(_unit_map(place, reuse))[chosen]
    absent = np.where(np.arange(fixed.shape[-1]) < counts[:, None], fixed, -1)
    candidates = jnp.concatenate([jnp.broadcast_to(absent, lead), mapped], -1)
    units = indices.ceil_div(place.kv_length, selection.granularity)
    return unique_first(candidates, units, capacity(reuse, place))


def capacity(reuse: Reuse, place: Place) -> int:
    """Static list length of the mapped modes: the chosen units, the text and the own run."""
    text = len(reuse.selection.text(place))
    return reuse.chosen(place) + text + max(len(units) for units in _own_units(place, reuse))


def fixed_units(place: Place, reuse: Reuse) -> tuple[Int[np.ndarray, "G F"], Int[np.ndarray, "G"]]:
    """(units, count) that every list of a later scale holds whatever was chosen."""
    scales, selection = place.schedule.scales, reuse.selection
    groups = indices.ceil_div(place.scale.tokens, selection.group)
    if reuse.mapping == "keep":
        parts = [[selection.fixed(reuse.source(place))] * groups]
        for index in range(reuse.decision + 1, place.index + 1):
            source = indices.composed_group_map(scales, index, place.index, selection.group)
            runs = _scale_units(place, reuse, index)
            parts.append([runs[group] for group in source])
    else:
        leading = scales[: reuse.sinks] if reuse.mapping == "relative" else ()
        sinks = max(sum(scale.tokens for scale in leading), place.schedule.text)
        sink_rows = place.rows.physical(place.index)[:sinks]
        sink_units = np.unique(sink_rows // selection.granularity)
        parts = [_own_units(place, reuse), [sink_units] * groups]
    return _ragged([_ordered_union(items) for items in zip(*parts, strict=True)])


def group_source(place: Place, decision: int, group: int) -> Int[np.ndarray, "G"]:
    """The decision group whose choice each group of the current scale uses."""
    return indices.composed_group_map(place.schedule.scales, decision, place.index, group)


def group_sizes(place: Place, group: int) -> Int[np.ndarray, "G"]:
    """Queries in every group; the last one may be ragged."""
    starts = np.arange(0, place.scale.tokens, group)
    return np.minimum(group, place.scale.tokens - starts)


def pairs(reuse: Reuse, place: Place) -> float:
    """(query, key) pairs of a later scale, per head and row.

    An upper bound for the mapped modes, and where runs of 8 rows hold padding.
    """
    selection = reuse.selection
    sizes = group_sizes(place, selection.group)
    if reuse.mapping == "keep":
        fixed, counts = fixed_units(place, reuse)
        kept = np.arange(fixed.shape[1]) < counts[:, None]
        tokens = indices.unit_tokens(place, selection.granularity)[fixed]
        keys = np.where(kept, tokens, 0).sum(1) + reuse.chosen(place) * selection.granularity
    else:
        keys = np.full(len(sizes), capacity(reuse, place) * selection.granularity)
    return float((np.minimum(keys, place.scale.end) * sizes).sum())


def unique_first(
    candidates: Int[Array, "R H G P"], units: int, capacity: int
) -> tuple[Int[Array, "R H G capacity"], Int[Array, "R H G"]]:
    """(lists, counts): first occurrences in order, at most `capacity`; negatives are absent."""
    flat = candidates.reshape(-1, candidates.shape[-1])
    position = jnp.broadcast_to(jnp.arange(flat.shape[1], dtype=jnp.int32), flat.shape)
    row = jnp.arange(flat.shape[0])[:, None]
    slot = jnp.where(flat < 0, units, flat)
    first = jnp.full((flat.shape[0], units + 1), flat.shape[1], jnp.int32)
    first = first.at[row, slot].min(position)
    kept = (jnp.take_along_axis(first, slot, 1) == position) & (flat >= 0)
    rank = jnp.where(kept, jnp.cumsum(kept, -1) - 1, capacity)
    out = jnp.zeros((flat.shape[0], capacity), jnp.int32).at[row, rank].set(flat, mode="drop")
    counts = jnp.minimum(kept.sum(-1), capacity).astype(jnp.int32)
    lead = candidates.shape[:-1]
    return out.reshape(*lead, capacity), counts.reshape(lead)


def upsample(
    x: Float[Array, "R H T D"], source: tuple[int, int], target: tuple[int, int]
) -> Float[Array, "R H T2 D"]:
    """Bilinear resize of a token grid with half-pixel centres, in float32."""
    rows, heads, _, depth = x.shape
    grid = x.reshape(rows, heads, *source, depth).astype(jnp.float32)
    for axis, (size, wanted) in enumerate(zip(source, target, strict=True), start=2):
        lower, upper, weight = indices.bilinear_taps(size, wanted)
        weight = weight.reshape(-1, *(1,) * (4 - axis))
        low, high = jnp.take(grid, lower, axis), jnp.take(grid, upper, axis)
        grid = low * (1 - weight) + high * weight
    return grid.reshape(rows, heads, -1, depth)


def _own_units(place: Place, reuse: Reuse) -> list[Int[np.ndarray, "_"]]:
    return _scale_units(place, reuse, place.index)


def _scale_units(place: Place, reuse: Reuse, index: int) -> list[Int[np.ndarray, "_"]]:
    """Local units of every group of one scale: the released run, or the runs of 8 it touches."""
    rows = place.rows.physical(index)
    scale, selection = place.schedule.scales[index], reuse.selection
    window = indices.window_of(reuse.windows, index, len(place.schedule))
    if selection.granularity > 1:
        unions = indices.local_union(scale, window, selection.group)
        return [np.unique(rows[union] // selection.granularity) for union in unions]
    starts, length = indices.local_runs(scale, window, selection.group, selection.multiple)
    return [rows[start : start + length] for start in starts]


def _ordered_union(parts: tuple[Int[np.ndarray, "_"], ...]) -> Int[np.ndarray, "n"]:
    joined = np.concatenate(parts)
    _, first = np.unique(joined, return_index=True)
    return joined[np.sort(first)]


def _ragged(
    items: list[Int[np.ndarray, "_"]],
) -> tuple[Int[np.ndarray, "G F"], Int[np.ndarray, "G"]]:
    counts = np.array([len(item) for item in items], np.int32)
    table = np.zeros((len(items), counts.max(initial=0)), np.int32)
    for row, item in zip(table, items, strict=True):
        row[: len(item)] = item
    return table, counts


@functools.lru_cache(maxsize=64)
def _unit_map(place: Place, reuse: Reuse) -> Int[np.ndarray, "units"]:
    """Target unit of every unit of the decision scale; a run of 8 goes where its middle goes."""
    source, granularity = reuse.source(place), reuse.selection.granularity
    if reuse.mapping == "scale":
        table = indices.scale_map(source.scale.end, place.scale.end, place.schedule.text)
    else:
        table = indices.relative_map(place.schedule.scales, source.index, place.index)
    middles = np.arange(0, source.kv_length, granularity) + granularity // 2
    rows = source.rows.physical(source.index)
    tokens = np.searchsorted(rows, middles, side="right") - 1
    return (place.rows.physical(place.index)[table[tokens]] // granularity).astype(np.int32)
