"""What one scale of a plan runs: rows, guidance, and a segment for every run of alike layers."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Literal

from sparvar_jax.plans.branch_rules import BranchRule
from sparvar_jax.plans.schedule import Scale
from sparvar_jax.plans.stores import Full, Store
from sparvar_jax.plans.strategy import AllTokens, Attention, Dense, TokenRule

Rows = Literal["both", "cond"]
SegmentRows = Literal["all", "shared", "cond"]
"""Which of a step's rows run in a segment. shared: the self-attention of the conditional rows, and
its keys and values, serve the unconditional ones too. cond: the conditional rows run alone, and the
unconditional ones are given the same update, so that what tells them apart stays as it was."""


@dataclasses.dataclass(frozen=True)
class Segment:
    """The longest run of layers that are alike: layers [start, stop).

    tokens: which tokens run through these layers together, or in every branch. store: how they keep
    keys and values. rows: which of the step's rows run.
    """

    layers: tuple[int, int]
    attention: Attention = Dense()
    tokens: TokenRule | BranchRule = AllTokens()
    store: Store = Full()
    rows: SegmentRows = "all"

    def __contains__(self, layer: int) -> bool:
        return self.layers[0] <= layer < self.layers[1]

    def alike(self, other: Segment) -> bool:
        """Whether two segments differ in their layers alone."""
        return self is other or self._what == other._what

    @property
    def _what(self) -> tuple[Attention, TokenRule | BranchRule, Store, SegmentRows]:
        return self.attention, self.tokens, self.store, self.rows


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

    @property
    def apart(self) -> bool:
        """Whether both rows of every picture run, and none looks at the other before the head."""
        alone = self.rows == "both" and self.merge_at == self.depth
        return alone and all(
            segment.rows == "all" and isinstance(segment.tokens, AllTokens)
            for segment in self.segments
        )

    def cached_rows(self, segment: Segment) -> int:
        """Rows for every picture that attend, and write keys and values, in a segment."""
        return self.row_factor if segment.rows == "all" else 1

    def multiplied_rows(self, segment: Segment) -> float:
        """Rows for every picture that are multiplied with a segment's weights.

        Shared rows leave out the four of a block's 14 widths squared a token that are attention's.
        """
        if self.rows == "cond" or segment.rows == "cond":
            return 1
        return 2 - 4 / 14 if segment.rows == "shared" else 2

    def segment(self, layer: int) -> Segment:
        """The segment that holds a layer, where segments tile all layers."""
        return self._by_layer[layer]

    @functools.cached_property
    def _by_layer(self) -> tuple[Segment, ...]:
        # Plans are made of questions about single layers: they are asked by the ten thousand.
        return tuple(segment for segment in self.segments for _ in range(*segment.layers))


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
    """(reads, writes) of a layer's state: the attention's, and the token rule's.

    A rule of a segment keeps its state in the first layer, a rule of branches in every layer.
    """
    segment = step.segment(layer)
    reads, writes = segment.attention.reads, segment.attention.writes
    if layer == segment.layers[0] or isinstance(segment.tokens, BranchRule):
        reads, writes = reads | segment.tokens.reads, writes | segment.tokens.writes
    return reads, writes
