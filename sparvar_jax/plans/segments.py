"""What one scale of a plan runs: rows, guidance, and a segment for every run of alike layers."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Literal

from sparvar_jax.plans.schedule import Scale
from sparvar_jax.plans.stores import Full, Store
from sparvar_jax.plans.strategy import AllTokens, Attention, Dense, TokenRule

Rows = Literal["both", "cond"]


@dataclasses.dataclass(frozen=True)
class Segment:
    """The longest run of layers that are alike: layers [start, stop).

    tokens: which tokens run through these layers together. store: how they keep keys and values.
    """

    layers: tuple[int, int]
    attention: Attention = Dense()
    tokens: TokenRule = AllTokens()
    store: Store = Full()

    def __contains__(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]

    def alike(self, other: Segment) -> bool:
        """Whether two segments differ in their layers alone."""
        return dataclasses.replace(self, layers=other.layers) == other


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

    @property
    def row_factor(self) -> int:
        """Rows that run for every picture."""
        return 2 if self.rows == "both" else 1

    def segment(self, layer: int) -> Segment:
        """The segment that holds a layer."""
        return next(segment for segment in self.segments if layer in segment)


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


def state_use(step: Step, layer: int) -> tuple[frozenset[str], frozenset[str]]:
    """(reads, writes) of a layer's state: the attention's, and the token rule's where it begins."""
    segment = step.segment(layer)
    reads, writes = segment.attention.reads, segment.attention.writes
    if layer == segment.layers[0]:
        reads, writes = reads | segment.tokens.reads, writes | segment.tokens.writes
    return reads, writes
