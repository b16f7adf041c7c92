"""Which row of a layer's key/value cache holds which token: plain Python and numpy.

A `RowMap` has one span a scale. Where every layer keeps every token, all layers share the map of a
named layout; a token rule or a store gives a layer a map of its own.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

LayoutName = Literal["packed", "aligned", "traced"]
"""packed: row is token index. aligned: scales start at multiples of 8, grid rows are padded to
multiples of 8. traced: some rows hold tokens that were chosen on the device."""

ROW_MULTIPLE = 128
ALIGNMENT = 8


class Slot(NamedTuple):
    """Cache rows of one scale's grid: token (y, x) lives at row `start + y * pitch + x`.

    clear: rows after the grid that whoever writes it zeroes, so that blocks of rows that kernels
    read hold nothing of an earlier picture.
    """

    start: int
    width: int
    pitch: int
    clear: int = 0


@dataclasses.dataclass(frozen=True)
class Span:
    """The cache rows of one scale.

    start: the first of them. rows: how many, padding included. shape: (height, width) of a grid
    whose row y, column x lies at `start + y * pitch + x`; None for rows without one: a prefix of
    text, or tokens that were chosen. visible: "traced" where which tokens they are is known on the
    device alone.
    """

    start: int
    rows: int
    shape: tuple[int, int] | None
    pitch: int
    visible: Literal["all", "traced"] = "all"

    @property
    def stop(self) -> int:
        return self.start + self.rows

    @property
    def size(self) -> tuple[int, int]:
        """(height, width); rows without a grid are one grid row."""
        return self.shape or (1, self.rows)

    @property
    def tokens(self) -> int:
        return self.size[0] * self.size[1]


@dataclasses.dataclass(frozen=True)
class RowMap:
    """Physical cache rows of one layer, a span for every scale of the schedule.

    total: allocated rows, a multiple of 128.
    """

    name: LayoutName
    spans: tuple[Span, ...]
    total: int

    def rows(self, scale: int) -> slice:
        """The physical rows that one scale occupies, padding included."""
        return slice(self.spans[scale].start, self.spans[scale].stop)

    def slot(self, scale: int) -> Slot:
        """Where the grid of one scale lies; rows up to a multiple of 128 after it are cleared."""
        span = self.spans[scale]
        return Slot(span.start, span.size[1], span.pitch, -span.stop % ROW_MULTIPLE)

    def filled(self, scale: int) -> int:
        """Physical rows in use once a scale is written: the kernels' `kv_length`."""
        return self.spans[scale].stop

    def tokens(self, scale: int) -> int:
        """Tokens in the rows in use once a scale is written."""
        return sum(span.tokens for span in self.spans[: scale + 1])

    def padded(self, scale: int) -> bool:
        """Whether any row below `filled(scale)` holds no token."""
        return self.filled(scale) != self.tokens(scale)

    def physical(self, scale: int) -> Int[np.ndarray, "tokens"]:
        """Physical row of every held token up to and including a scale, in the order of tokens."""
        return _physical(self)[: self.tokens(scale)]

    def gaps(self, scale: int) -> tuple[tuple[int, int], ...]:
        """The [start, stop) ranges of rows below `filled(scale)` that hold no token."""
        return _gaps(self, scale)

    def valid(self, scale: int) -> Bool[np.ndarray, "rows"]:
        """Which of the first `filled(scale)` rows hold a token."""
        mask = np.zeros(self.filled(scale), bool)
        mask[self.physical(scale)] = True
        return mask

    def holding(self, kept: tuple[int | None, ...]) -> RowMap:
        """The map of a layer that holds only `kept[s]` chosen tokens of scale s (None: all of it).

        Later scales move up; a chosen scale has no grid any more.
        """
        if not any(number is not None for number in kept):
            return self
        return _holding(self, kept)


@functools.lru_cache
def row_map(sizes: tuple[tuple[int, int], ...], name: LayoutName, prefix: bool = False) -> RowMap:
    """The rows of whole scales in a named layout. prefix: scale 0 has no grid.

    Raises ValueError for a layout that is not "packed" or "aligned".
    """
    if name not in ("packed", "aligned"):
        raise ValueError(f"layout must be 'packed' or 'aligned', got {name!r}")
    step = ALIGNMENT if name == "aligned" else 1
    spans: list[Span] = []
    for index, (height, width) in enumerate(sizes):
        start = -(-spans[-1].stop // step) * step if spans else 0
        if prefix and index == 0:
            spans.append(Span(start, width, None, width))
            continue
        pitch = -(-width // step) * step
        spans.append(Span(start, height * pitch, (height, width), pitch))
    return RowMap(name, tuple(spans), _allocated(spans))


def _allocated(spans: list[Span]) -> int:
    return -(-spans[-1].stop // ROW_MULTIPLE) * ROW_MULTIPLE


@functools.lru_cache
def _holding(whole: RowMap, kept: tuple[int | None, ...]) -> RowMap:
    step = ALIGNMENT if whole.name == "aligned" else 1
    spans: list[Span] = []
    for span, number in zip(whole.spans, kept, strict=True):
        start = -(-spans[-1].stop // step) * step if spans else 0
        if number is None:
            spans.append(dataclasses.replace(span, start=start))
        else:
            spans.append(Span(start, number, None, number, "traced"))
    return RowMap("traced", tuple(spans), _allocated(spans))


@functools.lru_cache
def _gaps(rows: RowMap, scale: int) -> tuple[tuple[int, int], ...]:
    edges = np.flatnonzero(np.diff(rows.valid(scale).astype(np.int8), prepend=1, append=1))
    return tuple((int(a), int(b)) for a, b in zip(edges[::2], edges[1::2], strict=True))


@functools.lru_cache
def _physical(rows: RowMap) -> Int[np.ndarray, "tokens"]:
    parts = [
        span.start + y * span.pitch + np.arange(span.size[1])
        for span in rows.spans
        for y in range(span.size[0])
    ]
    return np.concatenate(parts).astype(np.int32)
