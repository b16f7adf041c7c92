"""A store that keeps what will be read: rows that nothing reads later lie in a shared scratch.

Of a whole picture that is the last scale, 39 % of the rows of a 1024x1024 picture. Attention reads
one run of rows, so wherever a scale's rows are in the scratch, the rows kept are copied in front.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jaxtyping import Array, Float, Shaped

from sparvar_jax.plans.rows import ROW_MULTIPLE, RowMap
from sparvar_jax.plans.stores import CacheShape, Full, ReadLater, Write
from sparvar_jax.plans.strategy import Place, View


class Run(NamedTuple):
    """Rows that lie together among the rows kept and among all rows: first rows, and how many."""

    kept: int
    whole: int
    rows: int


class Held(NamedTuple):
    """What a layer holds while it attends. shown: what attention sees."""

    kept: Any
    shared: Any
    shown: View


@dataclasses.dataclass(frozen=True)
class Lean(Full):
    """Every key and value that a later scale reads; the others in a scratch of all layers.

    What attention sees is what `Full` shows, row by row. Bound, `kept` names the scales that are
    read after their own step, and `last` is the last scale that runs.
    """

    kept: tuple[int, ...] = ()
    last: int | None = None

    name = "lean"

    def bind(self, later: ReadLater) -> Lean:
        """A scale that is read by no step after its own is not kept, unless it is named already.

        Plans whose layers read the same scales share compiled steps.
        """
        index, kept = 0, []
        while scales := later(index):
            kept += [index] if index in scales else []
            index += 1
        return self.joined(dataclasses.replace(self, kept=tuple(kept), last=index))

    def joined(self, other: Lean) -> Lean:
        """What keeps whatever this one or the other keeps, and runs as far as either."""
        kept = tuple(sorted({*self.kept, *other.kept}))
        last = max(-1 if store.last is None else store.last for store in (self, other))
        return dataclasses.replace(self, kept=kept, last=last)

    def start(self, shape: CacheShape, whole: RowMap) -> Any:
        """One pair of buffers that holds the scales kept, and nothing else."""
        length = layout(whole, self.kept).total
        return View(shape.buffer(length), shape.buffer(length))

    def shared(self, shape: CacheShape, wholes: tuple[RowMap, ...]) -> View:
        """The scratch: all rows of the longest layer up to the last scale that runs."""
        assert self.last is not None
        length = max(_multiple(whole.spans[self.last].stop) for whole in wholes)
        return View(shape.buffer(length), shape.buffer(length))

    def write(self, kept: Any, shared: Any, write: Write, place: Place) -> tuple[jax.Array, Any]:
        """In place where a layer's kept rows are its first rows; else into the scratch.

        This scale is written before the kept rows are copied in: its rows come from the layer
        before, so that no layer's copy can begin while the layer before still reads the scratch.
        """
        slot = place.rows.slot(place.index)
        if self.in_place(place):
            q, k, v = write(kept.k, kept.v, slot)
            return q, Held(View(k, v), shared, View(k, v))
        q, k, v = write(shared.k, shared.v, slot)
        scratch = View(k, v)
        if place.index in self.kept:
            # Ahead of attention, so that nothing reads this layer's rows once it is done.
            q, kept = jax.lax.optimization_barrier((q, self.save(kept, scratch, len(q), place)))
        scratch = self.load(kept, scratch, len(q), place)
        return q, Held(kept, scratch, scratch)

    def view(self, held: Held, place: Place) -> View:
        return held.shown

    def keep(self, held: Held, q: Float[Array, "R H T D"], place: Place) -> tuple[Any, Any]:
        return held.kept, held.shared

    def in_place(self, place: Place) -> bool:
        """Whether the rows kept, this scale's among them, lie where attention looks for them."""
        runs = self.runs(place.rows, place.index + 1)
        return place.index in self.kept and all(run.kept == run.whole for run in runs)

    def runs(self, whole: RowMap, end: int) -> tuple[Run, ...]:
        """Where the rows of the kept scales below `end` lie, in as few runs as there are."""
        return runs_of(whole, tuple(scale for scale in self.kept if scale < end))

    def save(self, kept: Any, scratch: View, rows: int, place: Place) -> Any:
        """What is kept, with this scale's rows from the scratch."""
        span = place.rows.spans[place.index]
        at = layout(place.rows, self.kept).starts[self.kept.index(place.index)]
        parts = (part[:rows, :, span.start : span.stop] for part in scratch)
        return View(*(put(old, new, at) for old, new in zip(kept, parts, strict=True)))

    def load(self, kept: Any, scratch: View, rows: int, place: Place) -> View:
        """The scratch with the rows of earlier scales."""
        for run in self.runs(place.rows, place.index):
            parts = (part[:rows, :, run.kept : run.kept + run.rows] for part in kept)
            scratch = View(
                *(put(old, new, run.whole) for old, new in zip(scratch, parts, strict=True))
            )
        return scratch


class Layout(NamedTuple):
    """Where the rows of the kept scales lie. total: a multiple of 128."""

    starts: tuple[int, ...]
    total: int


@functools.lru_cache
def layout(whole: RowMap, kept: tuple[int, ...]) -> Layout:
    """The kept scales moved together; a scale right after its forerunner keeps its distance."""
    starts: list[int] = []
    stop = 0
    for number, scale in enumerate(kept):
        span = whole.spans[scale]
        follows = kept[number - 1] == scale - 1 if number else scale == 0
        before = whole.spans[scale - 1].stop if scale else 0
        starts.append(stop + (span.start - before if follows else 0))
        stop = starts[-1] + span.rows
    return Layout(tuple(starts), _multiple(stop))


@functools.lru_cache
def runs_of(whole: RowMap, kept: tuple[int, ...]) -> tuple[Run, ...]:
    """The rows of the kept scales, neighbours that lie alike in both places joined."""
    runs: list[Run] = []
    for start, scale in zip(layout(whole, kept).starts, kept, strict=True):
        span = whole.spans[scale]
        if runs and start - runs[-1].kept == span.start - runs[-1].whole:
            runs[-1] = runs[-1]._replace(rows=start + span.rows - runs[-1].kept)
        else:
            runs.append(Run(start, span.start, span.rows))
    return tuple(runs)


def put(
    buffer: Shaped[Array, "Rk H S D"], part: Shaped[Array, "R H T D"], start: int
) -> Shaped[Array, "Rk H S D"]:
    """A buffer with rows of its first images from `start` on."""
    return jax.lax.dynamic_update_slice(buffer, part.astype(buffer.dtype), (0, 0, start, 0))


def _multiple(rows: int) -> int:
    return -(-rows // ROW_MULTIPLE) * ROW_MULTIPLE
