"""Index arithmetic of the sparse policies: groups, local runs, maps across scales, interpolation.

Everything here is numpy and runs at trace time; tokens are counted without padding.
"""

from __future__ import annotations

import functools
import itertools

import numpy as np
from jaxtyping import Float, Int

from sparvar_jax.plans.schedule import Scale, ScaleSchedule
from sparvar_jax.plans.strategy import Place


def ceil_div(value: int, divisor: int) -> int:
    """Quotient rounded up."""
    return -(-value // divisor)


def scale_index(schedule: ScaleSchedule, where: int | float) -> int:
    """The scale that `where` names: an index, a negative one from the end, or a share of tokens.

    A share in (0, 1) takes the scale whose end lies nearest to that share of all tokens. Raises
    ValueError for anything outside the schedule.
    """
    count = len(schedule)
    if isinstance(where, float):
        if not 0 < where < 1:
            raise ValueError(f"a share of the tokens must lie in (0, 1), got {where}")
        ends = np.array([scale.end for scale in schedule.scales]) / schedule.tokens
        return int(np.argmin(np.abs(ends - where)))
    if not -count <= where < count:
        raise ValueError(
            f"scale {where} is not one of the {count} scales: give -{count}..{count - 1}, "
            "or a share of the tokens such as 0.39"
        )
    return where % count


def decision_index(schedule: ScaleSchedule, where: int | float, decides: str) -> int:
    """The scale that `where` names, at which `decides` is found for later ones.

    Raises ValueError for the last scale, and for a prefix of text: it has no grid to carry from.
    """
    decision = scale_index(schedule, where)
    if decision + 1 >= len(schedule):
        raise ValueError(
            f"decision scale {decision} is the last one: nothing later could use its {decides}"
        )
    if not schedule.scales[decision].grid:
        raise ValueError(
            f"decision scale {decision} is a prefix of text, whose {decides} no grid can take "
            f"over: decide at one of the scales {decision + 1}..{len(schedule) - 2}"
        )
    return decision


def kept_count(length: int, keep: float, multiple: int) -> int:
    """How many of `length` keys a share keeps: rounded half-even to a multiple, at least one.

    A share of 1 keeps everything, whatever the multiple.
    """
    if keep >= 1:
        return length
    rounded = multiple * int(np.round(keep * length / multiple))
    return min(max(rounded, multiple), length)


def unit_tokens(place: Place, granularity: int) -> Int[np.ndarray, "units"]:
    """Tokens in every run of `granularity` cache rows filled at a place."""
    valid = place.rows.valid(place.index)
    return np.pad(valid, (0, -len(valid) % granularity)).reshape(-1, granularity).sum(1)


def group_map(source: int, target: int) -> Int[np.ndarray, "target"]:
    """The query group of a coarser scale that stands for each group of a finer one."""
    centre = (np.arange(target) + 0.5) / target * source - 0.5
    return np.clip(np.round(centre), 0, source - 1).astype(np.int32)


def composed_group_map(
    scales: tuple[Scale, ...], decision: int, index: int, group: int
) -> Int[np.ndarray, "G"]:
    """Groups of scale `decision` for those of scale `index`, mapped scale by scale as released."""
    counts = [ceil_div(scale.tokens, group) for scale in scales[decision : index + 1]]
    groups = np.arange(counts[0], dtype=np.int32)
    for source, target in itertools.pairwise(counts):
        groups = groups[group_map(source, target)]
    return groups


def window_of(windows: tuple[int, ...], index: int, count: int) -> int:
    """The window of a scale in a list counted from the schedule's end; the first one repeats."""
    return windows[max(index - count + len(windows), 0)]


@functools.lru_cache(maxsize=64)
def local_union(scale: Scale, window: int, group: int) -> tuple[Int[np.ndarray, "_"], ...]:
    """Sorted keys that the windows of each query group see together, clipped at the borders.

    Half the window, rounded down, is seen to each side; a negative window sees nothing.
    """
    unions = []
    for start in range(0, scale.tokens, group):
        stop = min(start + group, scale.tokens)
        parts = [np.zeros(0, np.int64)]
        for y in range(start // scale.width, (stop - 1) // scale.width + 1):
            first = max(start - y * scale.width, 0)
            last = min(stop - 1 - y * scale.width, scale.width - 1)
            parts.append(_box(scale, y, first, last, window))
        unions.append(np.unique(np.concatenate(parts)))
    return tuple(unions)


def _box(scale: Scale, y: int, left: int, right: int, window: int) -> Int[np.ndarray, "keys"]:
    reach = window // 2
    if reach < 0:
        return np.zeros(0, np.int64)
    ys = np.arange(max(y - reach, 0), min(y + reach, scale.height - 1) + 1)
    xs = np.arange(max(left - reach, 0), min(right + reach, scale.width - 1) + 1)
    return (scale.offset + ys[:, None] * scale.width + xs).reshape(-1)


def local_runs(
    scale: Scale, window: int, group: int, multiple: int
) -> tuple[Int[np.ndarray, "G"], int]:
    """(start of each group's run, common length): the released form of a local window.

    A run starts at the first key of the group's union; its length is the largest union rounded up
    to `multiple` (never more than the scale). Runs that would pass the end are shifted left.
    """
    unions = local_union(scale, window, group)
    longest = max(len(union) for union in unions)
    length = min(ceil_div(longest, multiple) * multiple, scale.tokens)
    firsts = np.array([union[0] if len(union) else scale.offset for union in unions])
    return np.minimum(firsts, scale.end - length).astype(np.int32), length


def scale_map(source: int, target: int, text: int = 0) -> Int[np.ndarray, "source"]:
    """The paper's key map: floor(target / source * index), in exact integer arithmetic.

    The first `text` tokens stay where they are, and the map counts from their end.
    """
    places = np.arange(source - text, dtype=np.int64)
    mapped = text + places * (target - text) // max(source - text, 1)
    return np.concatenate([np.arange(text), mapped]).astype(np.int32)


def relative_map(scales: tuple[Scale, ...], decision: int, index: int) -> Int[np.ndarray, "S"]:
    """Where each key up to the decision scale lies when everything moves on by `index - decision`.

    A token (y, x) of scale j goes to scale max(index - (decision - j), 0), to the cell
    (floor(y * height' / height), floor(x * width' / width)). A prefix of text stays where it is.
    """
    parts, coarsest = [], 0 if scales[0].grid else 1
    for source in scales[: decision + 1]:
        target = scales[max(index - (decision - source.index), coarsest)]
        target = target if source.grid else source
        y = np.arange(source.height) * target.height // source.height
        x = np.arange(source.width) * target.width // source.width
        parts.append((target.offset + y[:, None] * target.width + x).reshape(-1))
    return np.concatenate(parts).astype(np.int32)


def bilinear_taps(
    source: int, target: int
) -> tuple[Int[np.ndarray, "target"], Int[np.ndarray, "target"], Float[np.ndarray, "target"]]:
    """(lower index, upper index, weight of the upper) of half-pixel bilinear interpolation."""
    position = (np.arange(target, dtype=np.float32) + 0.5) * np.float32(source / target) - 0.5
    position = np.maximum(position, 0)
    lower = np.minimum(position.astype(np.int32), source - 1)
    upper = np.minimum(lower + 1, source - 1)
    return lower, upper, (position - lower).astype(np.float32)
