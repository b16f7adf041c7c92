"""A generation as a frozen value: which scales run, for which rows, and how each layer attends.

`dense_plan` is the start; policies are functions from plan to plan. Equal plans hash equal and
share compiled steps. Nothing here holds an array.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any, Literal

from sparvar_jax.plans.schedule import LayoutName, Scale, ScaleSchedule
from sparvar_jax.plans.strategy import AllTokens, Attention, Dense, Place, TokenRule

Rows = Literal["both", "cond"]
LAST_SCALES = 3


@dataclasses.dataclass(frozen=True)
class Segment:
    """The longest run of layers that are alike: layers [start, stop)."""

    layers: tuple[int, int]
    attention: Attention = Dense()
    tokens: TokenRule = AllTokens()

    def __contains__(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]


@dataclasses.dataclass(frozen=True)
class Step:
    """One scale of a generation.

    rows: "both" runs conditional and unconditional rows, "cond" the conditional ones only.
    merge_at: None turns guidance off, the depth mixes logits, a smaller m mixes the hidden state
    after block m (0-based) into both halves.
    """

    scale: Scale
    rows: Rows
    merge_at: int | None
    segments: tuple[Segment, ...]

    @property
    def depth(self) -> int:
        return self.segments[-1].layers[1]

    def segment(self, layer: int) -> Segment:
        """The segment that holds a layer."""
        return next(segment for segment in self.segments if layer in segment)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one generation runs.

    schedule: always the full one, because rotary positions and code resizing depend on it.
    layout: the cache layout. steps: what actually runs, a prefix of the schedule.
    """

    schedule: ScaleSchedule
    layout: LayoutName
    steps: tuple[Step, ...]
    name: str = dataclasses.field(default="dense", compare=False)

    def __post_init__(self):
        validate(self)

    @property
    def depth(self) -> int:
        return self.steps[0].depth

    def place(self, step: int) -> Place:
        return Place(self.schedule, self.layout, self.steps[step].scale.index)

    def live_after(self, step: int, layer: int) -> frozenset[str]:
        """State entries of a layer that a later step still reads."""
        live: set[str] = set()
        for later in reversed(self.steps[step + 1 :]):
            attention = later.segment(layer).attention
            live = (live - attention.writes) | attention.reads
        return frozenset(live)

    def density(self, last: int | None = LAST_SCALES) -> float:
        """Kept over dense (query, key) pairs in the schedule's last scales (None: all scales).

        Counts all layers and rows, decision steps included; scales and rows not run keep nothing.
        """
        scales = self.schedule.scales[-last:] if last else self.schedule.scales
        rows = _row_count(self.steps[0].rows)
        dense = sum(scale.tokens * scale.end for scale in scales) * self.depth * rows
        kept = sum(_kept_pairs(self, i) for i, s in enumerate(self.steps) if s.scale in scales)
        return kept / dense

    def describe(self) -> str:
        """A table of scale, rows, layers, strategy, tokens, keys a query and density."""
        return _describe(self)


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
        raise ValueError(f"merge_at must lie in 0..{depth}, got {merge_at}")
    segments: tuple[Segment, ...] = (Segment((0, depth)),)
    rows: Rows = "both" if any(flags) else "cond"
    steps = tuple(
        Step(scale, rows, merge if flag else None, split_at_merge(segments, merge, depth))
        for scale, flag in zip(schedule.scales, flags, strict=True)
    )
    return Plan(schedule, layout, steps)


def split_at_merge(
    segments: tuple[Segment, ...], merge_at: int | None, depth: int
) -> tuple[Segment, ...]:
    """Segments cut after block `merge_at`, where guidance mixes the hidden state."""
    if merge_at is None or merge_at >= depth:
        return segments
    cut = merge_at + 1
    pieces = []
    for segment in segments:
        start, stop = segment.layers
        bounds = [start, cut, stop] if start < cut < stop else [start, stop]
        pieces += [
            dataclasses.replace(segment, layers=(a, b)) for a, b in itertools.pairwise(bounds)
        ]
    return tuple(pieces)


def map_attention(
    plan: Plan, choose: Callable[[Step, int], Attention | None], *, layout: LayoutName | None = None
) -> Plan:
    """A plan whose layer attention is `choose(step, layer)`, or stays where that is None.

    Runs of equal layers become one segment each. This is what policies are made of.
    """
    steps = []
    for step in plan.steps:
        segments: list[Segment] = []
        for layer in range(plan.depth):
            old = step.segment(layer)
            attention = choose(step, layer) or old.attention
            last = segments[-1] if segments else None
            if last and (last.attention, last.tokens) == (attention, old.tokens):
                segments[-1] = dataclasses.replace(last, layers=(last.layers[0], layer + 1))
            else:
                segments.append(Segment((layer, layer + 1), attention, old.tokens))
        pieces = split_at_merge(tuple(segments), step.merge_at, plan.depth)
        steps.append(dataclasses.replace(step, segments=pieces))
    return dataclasses.replace(plan, steps=tuple(steps), layout=layout or plan.layout)


def validate(plan: Plan) -> None:
    """Raise ValueError, naming scale and layers, unless the plan can run."""
    if not plan.steps:
        raise ValueError("a plan must run at least one scale, got none")
    ran = tuple(step.scale for step in plan.steps)
    if ran != plan.schedule.scales[: len(ran)]:
        raise ValueError(
            f"steps must be the first scales of the schedule in order, got {[s.index for s in ran]}"
        )
    for before, after in zip(plan.steps, plan.steps[1:], strict=False):
        if _row_count(after.rows) > _row_count(before.rows):
            raise ValueError(
                f"scale {after.scale.index} runs rows {after.rows!r} after {before.rows!r}: "
                "rows dropped earlier have no cache to continue from"
            )
    for step in plan.steps:
        _validate_step(plan, step)
    _validate_state(plan)


def _validate_step(plan: Plan, step: Step) -> None:
    where = f"scale {step.scale.index}"
    expected = 0
    for segment in step.segments:
        start, stop = segment.layers
        if start != expected or stop <= start:
            raise ValueError(
                f"{where}: segments must tile layers 0..{plan.depth}, got {start}..{stop} "
                f"after {expected}"
            )
        expected = stop
        if plan.layout not in segment.attention.layouts:
            raise ValueError(
                f"{where}, layers {start}..{stop}: {segment.attention.name} cannot read the "
                f"{plan.layout} cache layout, only {' or '.join(segment.attention.layouts)}"
            )
    if expected != plan.depth:
        raise ValueError(f"{where}: segments end at layer {expected}, expected {plan.depth}")
    if step.merge_at is not None:
        if step.rows != "both":
            raise ValueError(f"{where}: guidance needs both rows, got rows {step.rows!r}")
        if step.merge_at < plan.depth and all(
            segment.layers[1] != step.merge_at + 1 for segment in step.segments
        ):
            raise ValueError(f"{where}: no segment ends after the merge layer {step.merge_at}")


def _validate_state(plan: Plan) -> None:
    for layer in range(plan.depth):
        written: set[str] = set()
        for step in plan.steps:
            attention = step.segment(layer).attention
            missing = attention.reads - written
            if missing:
                raise ValueError(
                    f"scale {step.scale.index}, layer {layer}: {attention.name} reads "
                    f"{sorted(missing)}, which no earlier scale wrote for this layer"
                )
            written |= attention.writes


def _row_count(rows: Rows) -> int:
    return 2 if rows == "both" else 1


def _kept_pairs(plan: Plan, index: int) -> float:
    step, place = plan.steps[index], plan.place(index)
    per_row = sum(
        (segment.layers[1] - segment.layers[0]) * segment.attention.pairs(place)
        for segment in step.segments
    )
    return per_row * _row_count(step.rows)


def _describe(plan: Plan) -> str:
    lines = ["scale  grid      rows  layers   attention             tokens   keys/query  density"]
    for index, step in enumerate(plan.steps):
        place = plan.place(index)
        for segment in step.segments:
            keys = segment.attention.pairs(place) / step.scale.tokens
            grid = f"{step.scale.height}x{step.scale.width}"
            layers = f"{segment.layers[0]}-{segment.layers[1] - 1}"
            tokens = segment.tokens.tokens(place)
            lines.append(
                f"{step.scale.index:5d}  {grid:8s}  {step.rows:4s}  {layers:7s}  "
                f"{segment.attention.name:20s}  {tokens:6d}  {keys:10.0f}  "
                f"{keys / step.scale.end:7.3f}"
            )
    lines.append(
        f"density {plan.density():.3f} over the last three scales, "
        f"{plan.density(None):.3f} over all; layout {plan.layout}"
    )
    return "\n".join(lines)


def with_implementation(plan: Plan, implementation: str | None) -> Plan:
    """The plan with every attention served by one kernel implementation (None: the best there is).

    Parity runs and kernel checks ask for "xla".
    """

    def choose(step: Step, layer: int) -> Attention | None:
        attention: Any = step.segment(layer).attention
        if not dataclasses.is_dataclass(attention) or not hasattr(attention, "implementation"):
            return None
        return dataclasses.replace(attention, implementation=implementation)  # type: ignore[type-var]

    return map_attention(plan, choose)
