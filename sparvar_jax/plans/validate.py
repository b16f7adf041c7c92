"""Whether a plan can run: complaints name the scale and the layers."""

from __future__ import annotations

import itertools
from collections.abc import Callable

from sparvar_jax.plans.branch_rules import BranchRule
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.segments import Step, state_use
from sparvar_jax.plans.strategy import Place


def validate(
    schedule: ScaleSchedule,
    steps: tuple[Step, ...],
    place: Callable[[int, int], Place],
    runs: Callable[[], tuple[int, ...]],
) -> None:
    """Raise ValueError, naming scale and layers, unless such a plan can run.

    place: of a step and a layer. runs: the first layers of runs that share their segments in every
    step, asked for once segments tile all layers; what holds for one holds for its run.
    """
    if not steps:
        raise ValueError("a plan must run at least one scale, got none")
    ran = tuple(step.scale for step in steps)
    if ran != schedule.scales[: len(ran)]:
        raise ValueError(
            f"steps must be the first scales of the schedule in order, got {[s.index for s in ran]}"
        )
    for before, after in itertools.pairwise(steps):
        if after.row_factor > before.row_factor:
            raise ValueError(
                f"scale {after.scale.index} runs rows {after.rows!r} after {before.rows!r}: "
                "rows dropped earlier have no cache to continue from"
            )
    depth = steps[0].depth
    for step in steps:
        _validate_segments(step, depth)
    firsts = runs()
    for index in range(len(steps)):
        _validate_rows(steps, index, place, firsts)
    for layer in range(depth):
        # A rule of a segment keeps its state in the first layer: the second stands for the rest.
        if layer in firsts or layer - 1 in firsts:
            _validate_state(steps, layer)
        if layer in firsts:
            _validate_shared_rows(steps, layer)


def _validate_segments(step: Step, depth: int) -> None:
    where = f"scale {step.scale.index}"
    expected = 0
    for segment in step.segments:
        start, stop = segment.layers
        if start != expected or stop <= start:
            raise ValueError(
                f"{where}: segments must tile layers 0..{depth}, got {start}..{stop} "
                f"after {expected}"
            )
        expected = stop
    if expected != depth:
        raise ValueError(f"{where}: segments end at layer {expected}, expected {depth}")
    if step.merge_at is not None:
        if step.rows != "both":
            raise ValueError(f"{where}: guidance needs both rows, got rows {step.rows!r}")
        if step.merge_at < depth and all(
            segment.layers[1] != step.merge_at + 1 for segment in step.segments
        ):
            raise ValueError(f"{where}: no segment ends after the merge layer {step.merge_at}")


def _validate_rows(
    steps: tuple[Step, ...],
    index: int,
    place_of: Callable[[int, int], Place],
    firsts: tuple[int, ...],
) -> None:
    """Token rules run a possible number of tokens; attentions can read what stores show."""
    step = steps[index]
    for segment in step.segments:
        start, stop = segment.layers
        where = f"scale {step.scale.index}, layers {start}..{stop}"
        for layer in (first for first in firsts if start <= first < stop):
            if segment.store != steps[0].segment(layer).store:
                raise ValueError(
                    f"{where}: the store is {segment.store.name}, at scale 0 it was "
                    f"{steps[0].segment(layer).store.name}: a layer keeps one store"
                )
            place = place_of(index, layer)
            if not 0 < place.queries <= step.scale.tokens:
                raise ValueError(
                    f"{where}: the token rule {segment.tokens.name} runs {place.queries} of "
                    f"{step.scale.tokens} tokens"
                )
            if place.rows.name not in segment.attention.layouts:
                raise ValueError(
                    f"{where}: {segment.attention.name} cannot read the {place.rows.name} cache "
                    f"layout, only {' or '.join(segment.attention.layouts)}"
                )


def _validate_shared_rows(steps: tuple[Step, ...], layer: int) -> None:
    """A layer whose unconditional rows stopped writing keys and values has none for them later."""
    before = steps[0]
    for step in steps:
        segment = step.segment(layer)
        if step.rows == "cond" and segment.rows != "all":
            raise ValueError(
                f"scale {step.scale.index}, layer {layer}: {segment.rows} rows need both rows, "
                "but the unconditional ones do not run"
            )
        if segment.rows == "shared" and isinstance(segment.tokens, BranchRule):
            raise ValueError(
                f"scale {step.scale.index}, layer {layer}: under {segment.tokens.name} rows choose "
                "their tokens apart, so they cannot share their attention"
            )
        if step.cached_rows(segment) > before.cached_rows(before.segment(layer)):
            raise ValueError(
                f"scale {step.scale.index}, layer {layer}: unconditional rows attend again after "
                f"scale {before.scale.index}, which left no keys of theirs: share or drop rows "
                "from one scale to the end"
            )
        before = step


def _validate_state(steps: tuple[Step, ...], layer: int) -> None:
    written: frozenset[str] = frozenset()
    for step in steps:
        reads, writes = state_use(step, layer)
        if reads - written:
            segment = step.segment(layer)
            missing = segment.attention.reads - written
            part = segment.attention if missing else segment.tokens
            raise ValueError(
                f"scale {step.scale.index}, layer {layer}: {part.name} reads "
                f"{sorted(reads - written)}, which no earlier scale wrote for this layer"
            )
        written |= writes
