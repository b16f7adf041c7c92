"""A generation as a frozen value: which scales run, for which rows, and what each layer does.

`dense_plan` is the start; policies are functions from plan to plan. Equal plans hash equal and
share compiled steps. Nothing here holds an array.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any

from sparvar_jax.plans.describe import describe
from sparvar_jax.plans.route import Route
from sparvar_jax.plans.rows import LayoutName, RowMap
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.segments import Rows, Segment, Step, split_at_merge, state_use
from sparvar_jax.plans.stores import Store
from sparvar_jax.plans.strategy import Attention, Place
from sparvar_jax.plans.validate import validate
from sparvar_jax.weights.told import shown

__all__ = ["Plan", "Rows", "Segment", "Step", "dense_plan", "map_attention", "map_segments"]
LAST_SCALES = 3


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one generation runs.

    schedule: always the full one, because rotary positions and code resizing depend on it.
    layout: the cache layout. steps: what actually runs, a prefix of the schedule. route: with one,
    these steps are those of its most careful plan; another may go on after some scale.
    """

    schedule: ScaleSchedule
    layout: LayoutName
    steps: tuple[Step, ...]
    name: str = dataclasses.field(default="dense", compare=False)
    route: Route | None = None

    def __post_init__(self):
        validate(self.schedule, self.steps, self.place, lambda: self._runs)
        if self.route is not None:
            self.route.check(self)

    @property
    def depth(self) -> int:
        return self.steps[0].depth

    @property
    def row_factor(self) -> int:
        """Rows of the cache for every picture."""
        return self.steps[0].row_factor

    @property
    def apart(self) -> bool:
        """Whether conditional and unconditional rows never meet before the head, and none is left
        out: then they can be drawn on different devices."""
        return self.route is None and all(step.apart for step in self.steps)

    def whole_rows(self, layer: int) -> RowMap:
        """The rows that a layer writes, all scales together: what no token rule holds back."""
        return self._rows[layer]

    def store(self, layer: int) -> Store:
        """How a layer keeps its rows; it knows what is read later."""
        return self._stores[layer]

    def place(self, step: int, layer: int = 0) -> Place:
        """Where a layer stands at a step."""
        known = (step, self._run_of[layer])
        if known not in self._places:
            self._places[known] = self._place(step, layer)
        return self._places[known]

    def _place(self, step: int, layer: int) -> Place:
        index = self.steps[step].scale.index
        rows = self._stores[layer].rows(self._rows[layer], index)
        if all(span.visible == "all" for span in rows.spans[: index + 1]):
            rows = dataclasses.replace(rows, name=self.layout)  # what is chosen later is not there
        return Place(self.schedule, self.layout, index, rows=rows, kept=self._kept(step, layer))

    def read_later(self, step: int, layer: int) -> frozenset[int]:
        """The scales whose cache rows a layer reads after a step."""
        whole = self.whole_rows(layer)
        scales: set[int] = set()
        for later in self.steps[step + 1 :]:
            place = Place(self.schedule, self.layout, later.scale.index, rows=whole)
            scales |= later.segment(layer).attention.scales(place)
        return frozenset(scales)

    def live_after(self, step: int, layer: int) -> frozenset[str]:
        """State entries of a layer that a later step still reads."""
        live: frozenset[str] = frozenset()
        for later in reversed(self.steps[step + 1 :]):
            reads, writes = state_use(later, layer)
            live = (live - writes) | reads
        return live

    @functools.cached_property
    def _runs(self) -> tuple[int, ...]:
        """The first layers of runs that share their segments in every step: nothing tells apart
        where layers of a run stand, so that it is worked out once for all of them."""
        return tuple(sorted({s.layers[0] for step in self.steps for s in step.segments}))

    @functools.cached_property
    def _run_of(self) -> tuple[int, ...]:
        """The number of the run of every layer."""
        stops = (*self._runs[1:], self.depth)
        runs = enumerate(zip(self._runs, stops, strict=True))
        return tuple(run for run, bounds in runs for _ in range(*bounds))

    def _of_layers(self, of_run: Callable[[int], Any]) -> tuple[Any, ...]:
        """One value a layer, from what the first layer of its run gives."""
        values = [of_run(layer) for layer in self._runs]
        return tuple(values[run] for run in self._run_of)

    @functools.cached_property
    def _places(self) -> dict[tuple[int, int], Place]:
        """(step, run of layers) -> where its layers stand, filled in as it is asked for."""
        return {}

    @functools.cached_property
    def _rows(self) -> tuple[RowMap, ...]:
        """What every layer writes."""
        base, rest = self.schedule.layout(self.layout), len(self.schedule) - len(self.steps)

        def rows(layer: int) -> RowMap:
            kept = (self._kept(step, layer) for step in range(len(self.steps)))
            return base.holding((*kept, *[None] * rest))

        return self._of_layers(rows)

    @functools.cached_property
    def _stores(self) -> tuple[Store, ...]:
        """The bound store of every layer."""

        def store(layer: int) -> Store:
            read_later = functools.partial(self.read_later, layer=layer)
            return self.steps[0].segment(layer).store.bind(read_later)

        return self._of_layers(store)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.schedule, self.layout, self.steps))

    def __hash__(self) -> int:
        return self._hash  # a plan is a key in every call, and large

    def _kept(self, step: int, layer: int) -> int | None:
        rule = self.steps[step].segment(layer).tokens
        return rule.tokens(Place(self.schedule, self.layout, self.steps[step].scale.index))

    def through(self, policy: Callable[[Plan], Plan]) -> Plan:
        """What a policy makes of this plan, and of every plan that its route may take."""
        if self.route is None:
            return policy(self)
        plans = tuple(policy(plan) for plan in self.route.plans)
        return dataclasses.replace(plans[0], route=dataclasses.replace(self.route, plans=plans))

    def density(self, last: int | None = LAST_SCALES) -> float:
        """Kept over dense (query, key) pairs in the schedule's last scales (None: all scales).

        Counts all layers and rows, decision steps included; scales and rows not run keep nothing.
        """
        scales = self.schedule.scales[-last:] if last else self.schedule.scales
        dense = sum(scale.tokens * scale.end for scale in scales) * self.depth * self.row_factor
        kept = sum(self._kept_pairs(i) for i, s in enumerate(self.steps) if s.scale in scales)
        return kept / dense

    def _kept_pairs(self, index: int) -> float:
        step = self.steps[index]
        total = 0.0
        for segment in step.segments:
            for first, layers in self._runs_in(segment):
                pairs = segment.attention.pairs(self.place(index, first))
                total += layers * pairs * step.cached_rows(segment)
        return total

    def work(self) -> float:
        """Tokens x rows that are multiplied with weights, over those of the dense plan.

        What time follows; density counts attention alone.
        """
        dense = self.schedule.tokens * self.depth * self.row_factor
        return sum(self._multiplied(index) for index in range(len(self.steps))) / dense

    def _multiplied(self, index: int) -> float:
        step = self.steps[index]
        return sum(
            layers * self.place(index, first).queries * step.multiplied_rows(segment)
            for segment in step.segments
            for first, layers in self._runs_in(segment)
        )

    def _runs_in(self, segment: Segment) -> Iterator[tuple[int, int]]:
        """(first layer, how many) of the runs within a segment of this plan."""
        bounds = itertools.pairwise([*self._runs, self.depth])
        return ((first, stop - first) for first, stop in bounds if first in segment)

    def describe(self) -> str:
        """A table of scale, rows, layers, strategy, tokens, keys a query and density."""
        footer = (
            f"density {self.density():.3f} over the last three scales, "
            f"{self.density(None):.3f} over all; tokens x rows multiplied {self.work():.3f}; "
            f"layout {self.layout}"
        )
        if self.route is not None:
            footer += (
                f"\nafter scale {self.steps[self.route.after].scale.index} "
                f"{self.route.chooser.name} takes one of {len(self.route.plans)} plans; above is "
                "the most careful"
            )
        return describe(self.steps, self.place, footer)


def dense_plan(
    schedule: ScaleSchedule,
    depth: int,
    *,
    guidance: bool | tuple[bool, ...] = True,
    merge_at: int | None = None,
    layout: LayoutName = "packed",
) -> Plan:
    """The plan of plain generation: every scale, every layer dense.

    guidance: on or off, or one flag a scale. With all flags off only conditional rows run.
    merge_at: guide the hidden state after this block instead of the logits.
    """
    flags = (guidance,) * len(schedule) if isinstance(guidance, bool) else tuple(guidance)
    if len(flags) != len(schedule):
        raise ValueError(f"guidance needs one flag for each of {len(schedule)} scales, got {flags}")
    merge = depth if merge_at is None else merge_at
    if not 0 <= merge <= depth:
        raise ValueError(f"merge_at must lie in 0..{depth}, got {shown(merge_at)}")
    segments: tuple[Segment, ...] = (Segment((0, depth)),)
    rows: Rows = "both" if any(flags) else "cond"
    steps = tuple(
        Step(scale, rows, merge if flag else None, split_at_merge(segments, merge, depth))
        for scale, flag in zip(schedule.scales, flags, strict=True)
    )
    return Plan(schedule, layout, steps)


def map_segments(
    plan: Plan, change: Callable[[Step, int, Segment], Segment], *, layout: LayoutName | None = None
) -> Plan:
    """A plan whose every layer does what `change(step, layer, its segment)` says.

    Runs of equal layers become one segment each. This is what policies are made of.
    """
    steps = []
    for step in plan.steps:
        segments: list[Segment] = []
        starts: list[int] = []
        for layer in range(plan.depth):
            new = change(step, layer, step.segment(layer))
            if not segments or not segments[-1].alike(new):
                segments.append(new)
                starts.append(layer)
        bounds = itertools.pairwise([*starts, plan.depth])
        runs = tuple(
            dataclasses.replace(segment, layers=layers)
            for segment, layers in zip(segments, bounds, strict=True)
        )
        pieces = split_at_merge(runs, step.merge_at, plan.depth)
        steps.append(dataclasses.replace(step, segments=pieces))
    return dataclasses.replace(plan, steps=tuple(steps), layout=layout or plan.layout)


def map_attention(
    plan: Plan, choose: Callable[[Step, int], Attention | None], *, layout: LayoutName | None = None
) -> Plan:
    """A plan whose layer attention is `choose(step, layer)`, or stays where that is None."""

    def change(step: Step, layer: int, old: Segment) -> Segment:
        chosen = choose(step, layer)
        return old if chosen is None else dataclasses.replace(old, attention=chosen)

    return map_segments(plan, change, layout=layout)


def with_store(plan: Plan, store: Store, layers: tuple[int, int] | None = None) -> Plan:
    """The plan with a store in layers [start, stop), by default in all."""
    start, stop = layers or (0, plan.depth)

    def change(step: Step, layer: int, old: Segment) -> Segment:
        return dataclasses.replace(old, store=store) if start <= layer < stop else old

    return map_segments(plan, change)
