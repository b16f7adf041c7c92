"""Adaptive selection: key blocks per query block and head until a share of the mass is covered.

The mass is measured at the decision scale and carried to later scales: block maps between scales
are numpy, the mass, the order and the counts are traced, the capacity is static.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

import pallas_kernels
from pallas_kernels.api import Implementation
from pallas_kernels.sparsity import BlockTable
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import Scale
from sparvar_jax.plans.strategy import LayerState, Output, Place, ReadsAll, View
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.indices import ceil_div, decision_index, unit_tokens
from sparvar_jax.policies.routing import Layers, Policy, assign

MASS = "adaptive.mass"
QUERY_BLOCK = 128
"""Queries that share a list; the key blocks' width is an option."""


@dataclasses.dataclass(frozen=True)
class AdaptiveDecision(ReadsAll):
    """Dense attention that measures the mass of every block pair. Leaves `adaptive.mass`."""

    block: int = 128
    implementation: Implementation | None = None

    name = "adaptive decision"
    writes = frozenset({MASS})

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """Dense output and the mean attention mass [R, H, query blocks, key blocks], float32."""
        del state
        out, sums = pallas_kernels.attention_column_sums(
            q, *view, place.kv_length, QUERY_BLOCK, gaps=place.gaps,
            logit_bound=place.logit_bound, hidden_finite=place.hidden_finite,
            implementation=self.implementation,
        )  # fmt: skip
        return Output(out, {MASS: block_mass(sums, self.block)})


@dataclasses.dataclass(frozen=True)
class AdaptiveSparse(ReadsAll):
    """Block-sparse attention over the blocks that cover the carried mass.

    coverage: share of the mass to reach. cap, floor: most and fewest blocks of a query block, as
    shares of the key blocks. sinks: leading scales whose blocks are always kept, as those of a
    prefix of text are.
    """

    decision: int
    coverage: float = 0.9
    cap: float = 0.25
    floor: float = 0.02
    block: int = 128
    sinks: int = 5
    implementation: Implementation | None = None

    name = "adaptive"
    reads = frozenset({MASS})

    def __post_init__(self):
        if not 0 < self.coverage <= 1:
            raise ValueError(f"coverage must be a share in (0, 1], got {self.coverage}")
        if not 0 <= self.floor <= self.cap <= 1 or self.cap == 0:
            raise ValueError(
                f"need 0 <= floor <= cap <= 1 and a positive cap, got {self.floor} and {self.cap}"
            )
        if self.block not in (64, 128):
            raise ValueError(f"block must be 64 or 128, got {self.block}")
        if self.sinks < 0:
            raise ValueError(f"sinks must be at least 0, got {self.sinks}")

    def limits(self, place: Place) -> tuple[int, int, int]:
        """(sink blocks, fewest, most) key blocks of a query block at one scale."""
        blocks = ceil_div(place.kv_length, self.block)
        leading = min(max(self.sinks, int(place.schedule.prefix)), place.index + 1)
        sinks = ceil_div(place.rows.filled(leading - 1), self.block) if leading else 0
        most = max(round(self.cap * blocks), sinks, 1)
        return sinks, min(max(round(self.floor * blocks), sinks, 1), most), most

    def pairs(self, place: Place) -> float:
        """An upper bound: every query block at its cap. What was kept depends on the data."""
        most = self.limits(place)[2]
        return float(min(most * self.block, place.scale.end) * place.scale.tokens)

    def kept(self, state: LayerState, place: Place) -> Float[Array, ""]:
        """(query, key) pairs per head and row that the layer state makes it keep, on average."""
        table = self.table(state[MASS], place)
        starts = np.arange(table.counts.shape[-1]) * QUERY_BLOCK
        queries = np.minimum(QUERY_BLOCK, place.scale.tokens - starts)
        tokens = jnp.asarray(unit_tokens(place, self.block))[table.indices]
        read = jnp.arange(table.indices.shape[-1]) < table.counts[..., None]
        keys = jnp.where(read, tokens, 0).sum(-1)
        return (keys * queries).sum(-1).mean()

    def table(self, mass: Float[Array, "R H Gq Gk"], place: Place) -> BlockTable:
        """The traced block table of one scale, from the decision scale's mass."""
        carried = carry_mass(mass, place, self.decision, self.block)
        sinks, floor, cap = self.limits(place)
        chosen, counts = choose_blocks(carried, self.coverage, sinks, floor, cap)
        gaps = place.gaps
        return BlockTable(chosen, counts, place.kv_length, QUERY_BLOCK, self.block, gaps)

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """Attention over the chosen blocks; leaves no state."""
        out = pallas_kernels.block_sparse_attention(
            q, *view, self.table(state[MASS][: q.shape[0]], place),
            logit_bound=place.logit_bound, hidden_finite=place.hidden_finite,
            implementation=self.implementation,
        )  # fmt: skip
        assert isinstance(out, jax.Array)
        return Output(out)


@checked
def adaptive(
    coverage: float = 0.9,
    cap: float = 0.25,
    floor: float = 0.02,
    block: int = 128,
    *,
    sinks: int = 5,
    first_scale: int | float = -3,
    layers: Layers = None,
) -> Policy:
    """Per-head block selection by covered attention mass, decided at `first_scale`.

    Not in the paper; its authors' newer experiments do the like. See `AdaptiveSparse`.
    """

    def apply(plan: Plan) -> Plan:
        decision = decision_index(plan.schedule, first_scale, "mass")
        later = AdaptiveSparse(decision, coverage, cap, floor, block, sinks)

        def choose(index: int) -> AdaptiveDecision | AdaptiveSparse | None:
            if index == decision and len(plan.steps) > decision + 1:
                return AdaptiveDecision(block)
            return later if index > decision else None

        return assign(plan, layers, choose)

    return apply


def block_mass(sums: Float[Array, "R H Gq S"], block: int) -> Float[Array, "R H Gq Gk"]:
    """Column sums of query blocks gathered into key blocks; every row sums to one."""
    pad = -sums.shape[-1] % block
    mass = jnp.pad(sums, ((0, 0), (0, 0), (0, 0), (0, pad)))
    mass = mass.reshape(*sums.shape[:-1], -1, block).sum(-1)
    return mass / mass.sum(-1, keepdims=True)


def carry_mass(
    mass: Float[Array, "R H Gq Gk"],
    place: Place,
    decision: int,
    block: int,
    query_block: int = QUERY_BLOCK,
) -> Float[Array, "R H Gq2 Gk2"]:
    """Mass of the decision scale's block pairs, spread over the blocks of a later scale.

    A key block's mass is divided by the number of blocks it lands on; a query block takes the mean
    of the query blocks it comes from.
    """
    queries, keys = carry_matrices(place, decision, block, query_block)
    return jnp.einsum("Aa,rhab,bB->rhAB", queries, mass, keys, precision="highest")


@functools.lru_cache(maxsize=64)
def carry_matrices(
    place: Place, decision: int, block: int, query_block: int = QUERY_BLOCK
) -> tuple[Float[np.ndarray, "Gq2 Gq"], Float[np.ndarray, "Gk Gk2"]]:
    """(query matrix, rows sum to one; key matrix, rows sum to one or, landing nowhere, to zero).

    Scale j moves to scale j + current - decision, cells keep their relative place; a prefix of text
    stays where it is.
    """
    scales, index = place.schedule.scales, place.index
    prefix, shift = int(place.schedule.prefix), index - decision
    sources = [_source_tokens(scales[j], scales[j + shift]) for j in range(prefix, decision + 1)]
    last = sources[-1] - scales[decision].offset
    positions = np.arange(scales[index].tokens)
    queries = _incidence(last, positions, scales[decision].tokens, query_block)
    rows = place.rows.physical(index)
    text = np.arange(scales[0].tokens if prefix else 0)
    moved = np.concatenate([rows[text], rows[scales[prefix + shift].offset :]])
    origin = rows[np.concatenate([text, *sources])]
    keys = _incidence(origin, moved, place.rows.filled(decision), block).T
    query_matrix = queries / queries.sum(1, keepdims=True)
    key_matrix = keys / np.maximum(keys.sum(1, keepdims=True), 1)
    return query_matrix.astype(np.float32), key_matrix.astype(np.float32)


def _source_tokens(source: Scale, target: Scale) -> Int[np.ndarray, "tokens"]:
    """For every cell of a target grid the token of the source grid that lies there."""
    y = np.arange(target.height) * source.height // target.height
    x = np.arange(target.width) * source.width // target.width
    return (source.offset + y[:, None] * source.width + x).reshape(-1)


def _incidence(sources, targets, source_rows: int, block: int) -> Int[np.ndarray, "to from"]:
    """Which source blocks hold a row that lands in which target block."""
    shape = ceil_div(int(targets.max()) + 1, block), ceil_div(source_rows, block)
    touched = np.zeros(shape, np.int64)
    touched[targets // block, sources // block] = 1
    return touched


def choose_blocks(
    mass: Float[Array, "R H Gq Gk"], coverage: float, sinks: int, floor: int, cap: int
) -> tuple[Int[Array, "R H Gq cap"], Int[Array, "R H Gq"]]:
    """(blocks, counts): sink blocks first, then the heaviest, until `coverage` of the mass is held.

    Counts lie in floor..cap.
    """
    sink = jnp.arange(mass.shape[-1]) < sinks
    order = jax.lax.top_k(jnp.where(sink, jnp.inf, mass), cap)[1]
    held = jnp.cumsum(jnp.take_along_axis(mass, order, -1), -1)
    short = held < coverage * mass.sum(-1, keepdims=True)
    counts = jnp.clip(short.sum(-1) + 1, floor, cap)
    return order.astype(jnp.int32), counts.astype(jnp.int32)
