"""What happens around the branches of a block: rules of single branches, and shared rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.attend import Run
from sparvar_jax.plans.branch_rules import BranchRule
from sparvar_jax.plans.segments import Segment
from sparvar_jax.plans.strategy import Place


def by_row(table: jax.Array) -> jax.Array:
    """Positions [T, D] or [R, T, D] with an axis of rows."""
    return table if table.ndim == 3 else table[None]


@dataclasses.dataclass
class Around:
    """Runs one block's branches as its segment says; gathers what its rule leaves.

    rule: of branches, None where there is none. shared: whether the self-attention of the first
    half of the rows serves both halves.
    """

    rule: BranchRule | None
    shared: bool
    place: Place
    state: Mapping[str, jax.Array]
    entries: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    reports: dict[str, jax.Array] = dataclasses.field(default_factory=dict)
    seen: list[str] = dataclasses.field(default_factory=list)

    @classmethod
    def of(cls, segment: Segment, place: Place, state: Mapping[str, jax.Array]) -> Around | None:
        """What a segment needs around the branches of a block; None where that is nothing."""
        rule = segment.tokens if isinstance(segment.tokens, BranchRule) else None
        shared = segment.rows == "shared"
        return cls(rule, shared, place, state) if rule or shared else None

    def __call__(self, name: str, run: Run, stream: Any, positions: Any) -> Any:
        """The stream after one branch."""
        self.seen.append(name)
        if self.shared and name == "self_attention":
            run = _shared(run)
        if self.rule is None:
            return run(stream, positions)
        out = self.rule.branch(name, run, stream, positions, self.place, self.state)
        self.entries |= out.state
        self.reports |= out.report
        return out.stream

    def leave(self, state: dict[str, jax.Array], report: dict[str, jax.Array]) -> None:
        """Add what the rule left in all branches to a layer's state and report."""
        if "self_attention" not in self.seen:
            raise ValueError(
                "the blocks of this model do not run their branches apart: take a plan without "
                "rules of branches (fastvar) and without shared rows (share_rows)"
            )
        state.update(self.entries)
        report.update(self.reports)


def _shared(run: Run) -> Run:
    """A branch that runs the first half of the rows; its output before the gain serves both."""

    def both(stream: Stream, positions: Any) -> Stream:
        x = stream.settled()
        half = len(x) // 2
        positions = jax.tree.map(lambda t: t[:half] if t.ndim == 3 else t, positions)
        out = run(Stream(x[:half]), positions)
        assert out.branch is not None
        return Stream(
            x, jnp.concatenate([out.branch, out.branch]), out.table, out.bias, index=out.index
        )

    return both
