"""Which heads attend least to an earlier scale: HeatKV's measure, of a model's generations."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import Plan, map_attention
from sparvar_jax.plans.strategy import Attention, LayerState, Output, Place, ReadsAll, View
from sparvar_jax.policies.head_orders import HeadOrders

MASS = "mass on scales"
TILE = 256
SINKS = 3


@dataclasses.dataclass(frozen=True)
class Weighed(ReadsAll):
    """An attention that also reports, of the first row, its dense mass on every scale."""

    inner: Attention

    name = "weighed"

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """The inner attention's result, and the mass [1, H, scales so far], a mean over queries."""
        output = self.inner(view, q, place, state)
        return output._replace(report={MASS: mass(q[:1], view.k[:1], place)[None]})


def mass(
    q: Float[Array, "1 H T D"], k: Float[Array, "1 H S D"], place: Place
) -> Float[Array, "H scales"]:
    """Share of softmax attention that falls on every scale, a mean over queries; float32."""
    keys = k[0][:, place.rows.physical(place.index)].astype(jnp.float32)
    ends = np.cumsum([span.tokens for span in place.rows.spans[: place.index + 1]])
    tiles = -(-q.shape[2] // TILE)
    pad = tiles * TILE - q.shape[2]
    queries = jnp.pad(q[0].astype(jnp.float32), ((0, 0), (0, pad), (0, 0)))
    queries = queries.reshape(len(queries), tiles, TILE, -1).swapaxes(0, 1)
    real = (np.arange(tiles * TILE) < q.shape[2]).reshape(tiles, TILE)

    def one(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        scores = jnp.einsum("htd,hsd->hts", tile[0], keys, precision="highest")
        weights = jax.nn.softmax(scores, -1) * tile[1][None, :, None]
        totals = jnp.cumsum(weights.sum(1), -1)[:, ends - 1]
        return jnp.diff(totals, axis=-1, prepend=0)

    return jax.lax.map(one, (queries, jnp.asarray(real))).sum(0) / q.shape[2]


def weighed(plan: Plan) -> Plan:
    """The plan whose attentions report their mass."""
    return map_attention(plan, lambda step, layer: Weighed(step.segment(layer).attention))


def measure(pipe: Pipeline, subjects: Sequence[Any], **options: Any) -> HeadOrders:
    """Orders of a pipeline's model from dense generations of some prompts, or classes.

    A pair's score for a source scale is its mass on it, averaged over queries, later scales and
    generations, of the conditional row. options: of `Pipeline.request`; picture n draws from
    seed + n. Raises ValueError without subjects.
    """
    if not subjects:
        raise ValueError("an order is measured from generations: give at least one prompt")
    found, seed = [], options.pop("seed", 0)
    for number, subject in enumerate(subjects):
        request = pipe.request([subject], plan="dense", seed=seed + number, **options)
        _, outputs = pipe.generator.run(
            weighed(request.plan), request.condition, request.controls, request.keys
        )
        found.append([np.concatenate([r[MASS] for r in output.reports]) for output in outputs])
    return orders_from([np.mean(masses, axis=0) for masses in zip(*found, strict=True)])


def orders_from(masses: Sequence[Float[np.ndarray, "L H _"]]) -> HeadOrders:
    """Orders from the mass [L, H, scales so far] of every scale drawn; ties by number."""
    layers, heads, _ = masses[0].shape
    sinks, orders = min(SINKS, len(masses) - 1), []
    for source in range(sinks, len(masses) - 1):
        score = np.mean([mass[..., source] for mass in masses[source + 1 :]], axis=0)
        orders.append(tuple(np.argsort(score.reshape(-1), kind="stable").tolist()))
    return HeadOrders(layers, heads, sinks, tuple(orders))
