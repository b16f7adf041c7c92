"""CS4A: columns of attention chosen at one scale and reused at the later ones (SparVAR).

At the decision scale a layer attends densely, sums the attention every key gets from each group of
queries, and keeps the heaviest keys. Later scales attend to those keys and a run of their own; what
sparse attention missed at the decision scale is added back, upsampled (the output cache).
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels.api import Implementation
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.strategy import LayerState, Output, Place, ReadsAll, View
from sparvar_jax.policies import columns as lists
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.columns import Mapping, Reuse, Selection
from sparvar_jax.policies.indices import decision_index, unit_tokens
from sparvar_jax.policies.routing import Layers, Policy, assign

COLUMNS = "cs4a.columns"
DIFFERENCE = "cs4a.difference"
WINDOWS = (7, 9)
"""The released local windows, of the last scales."""


@dataclasses.dataclass(frozen=True)
class Cs4aDecision(ReadsAll):
    """Dense attention that also chooses columns. Leaves `cs4a.columns` and, with the output cache,
    `cs4a.difference`: dense minus sparse output, in q's dtype.
    """

    selection: Selection = Selection()
    cache: bool = True
    implementation: Implementation | None = None

    name = "cs4a decision"

    @property
    def writes(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({COLUMNS, DIFFERENCE} if self.cache else {COLUMNS})

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """Dense output, the kept columns [R, H, G, K] and the difference [R, H, T, D]."""
        del state
        selection, cached = self.selection, _cache_options(place, self.implementation)
        out, sums = pallas_kernels.attention_column_sums(
            q, *view, place.kv_length, selection.group, hidden_finite=place.hidden_finite, **cached
        )
        chosen = lists.select(sums, selection, place, self.implementation)
        if not self.cache:
            return Output(out, {COLUMNS: chosen})
        columns, counts = lists.at_decision(chosen, selection, place)
        sparse = pallas_kernels.column_sparse_attention(
            q, *view, columns, counts, kv_length=place.kv_length, group=selection.group,
            granularity=selection.granularity, **cached,
        )  # fmt: skip
        return Output(out, {COLUMNS: chosen, DIFFERENCE: out - sparse})


@dataclasses.dataclass(frozen=True)
class Cs4aSparse(ReadsAll):
    """Attention to columns chosen at an earlier scale and to the scale's own local run."""

    reuse: Reuse
    cache: bool = True
    implementation: Implementation | None = None

    name = "cs4a"

    @property
    def reads(self) -> frozenset[str]:  # type: ignore[override]
        return frozenset({COLUMNS, DIFFERENCE} if self.cache else {COLUMNS})

    def pairs(self, place: Place) -> float:
        """Kept pairs; an upper bound where columns may coincide or runs of 8 hold padding."""
        return lists.pairs(self.reuse, place)

    def kept(self, state: LayerState, place: Place) -> Float[Array, ""]:
        """(query, key) pairs per head and row that the layer state makes it keep, on average."""
        selection = self.reuse.selection
        columns, counts = lists.at_later_scale(state[COLUMNS], self.reuse, place)
        tokens = jnp.asarray(unit_tokens(place, selection.granularity))[columns]
        keys = jnp.where(jnp.arange(columns.shape[-1]) < counts[..., None], tokens, 0).sum(-1)
        return (keys * lists.group_sizes(place, selection.group)).sum(-1).mean()

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """Sparse output plus the upsampled output cache; leaves no state."""
        rows = q.shape[0]
        selection = self.reuse.selection
        columns, counts = lists.at_later_scale(state[COLUMNS][:rows], self.reuse, place)
        out = pallas_kernels.column_sparse_attention(
            q, *view, columns, counts, kv_length=place.kv_length, group=selection.group,
            granularity=selection.granularity, **_cache_options(place, self.implementation),
        )  # fmt: skip
        if self.cache:
            sizes = place.schedule.sizes
            missed = lists.upsample(
                state[DIFFERENCE][:rows], sizes[self.reuse.decision], sizes[place.index]
            )
            out = (out + missed).astype(out.dtype)
        return Output(out)


@checked
def cs4a(
    decision_scale: int | float = -3,
    keep: float = 0.2,
    group: int = 192,
    multiple: int = 112,
    granularity: Literal[1, 8] = 1,
    windows: tuple[int, ...] = WINDOWS,
    cache: bool = True,
    mapping: Mapping = "keep",
    *,
    sinks: int = 5,
    layers: Layers = None,
) -> Policy:
    """Columns decided at one scale and reused at every later one, in the given layers.

    decision_scale: index, negative from the end, or share of the tokens. keep: share of the keys
    kept by each group of `group` queries, rounded to `multiple` keys. granularity: single keys or
    runs of 8. windows: local window of every later scale, counted from the end. mapping: "keep"
    (released), "scale" (the paper's formula) or "relative" (see `Reuse`).
    """
    selection = Selection(keep, group, multiple, granularity, ranked=mapping == "relative")

    def apply(plan: Plan) -> Plan:
        decision = decision_index(plan.schedule, decision_scale, "columns")
        first = Cs4aDecision(selection, cache)
        later = Cs4aSparse(Reuse(decision, selection, tuple(windows), mapping, sinks), cache)

        def choose(index: int) -> Cs4aDecision | Cs4aSparse | None:
            if index == decision and len(plan.steps) > decision + 1:
                return first
            return later if index > decision else None

        return assign(plan, layers, choose)

    return apply


def _cache_options(place: Place, implementation: Implementation | None) -> dict[str, Any]:
    """What every kernel call needs to know of the cache and of the model's logits."""
    return {
        "gaps": place.gaps,
        "logit_bound": place.logit_bound,
        "implementation": implementation,
    }
