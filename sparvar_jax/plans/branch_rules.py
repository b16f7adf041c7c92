"""Rules that decide in every branch of every layer anew which tokens it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax

from sparvar_jax.plans.strategy import LayerState, Place, UsesState


class BranchOutput(NamedTuple):
    """What a branch rule gives: the stream, the layer state entries it leaves, and a report."""

    stream: Any
    state: Mapping[str, jax.Array] = {}
    report: Mapping[str, jax.Array] = {}


@runtime_checkable
class BranchRule(UsesState, Protocol):
    """A token rule that decides in every branch of every layer anew.

    It stands in a segment in place of a `TokenRule`; every one of its layers has a state.
    """

    def tokens(self, place: Place) -> int | None:
        """How many tokens the self-attention runs and caches; None for all of them."""
        ...

    def branch(
        self,
        name: str,
        run: Callable[[Any, Any], Any],
        stream: Any,
        positions: Any,
        place: Place,
        state: LayerState,
    ) -> BranchOutput:
        """One branch of one block. stream: a `models.stream.Stream`; positions: of its tokens.

        `run(stream, positions)` is the branch on whatever tokens it is given.
        """
        ...
