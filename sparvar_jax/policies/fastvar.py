"""FastVAR (arXiv 2503.23367): late scales run their liveliest tokens in every branch of a block;
the others are given the update that their place got at an earlier scale, the cache scale.

Described by its published code (MIT). A parity mode: three choices a layer cost time, the holes it
leaves among the keys fit no window, and plain `drop_uncond` is nearer to the dense picture.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from sparvar_jax.models import quantizer
from sparvar_jax.models.stream import Stream, updated
from sparvar_jax.plans.branch_rules import BranchOutput
from sparvar_jax.plans.plan import Plan, Segment, Step, map_segments
from sparvar_jax.plans.strategy import AllTokens, LayerState, Place
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.indices import scale_index
from sparvar_jax.policies.routing import Layers, Policy, layer_range
from sparvar_jax.policies.scales import skip_last_scales

BRANCHES = ("self_attention", "cross_attention", "feed_forward")
MAPS = frozenset(f"{name} update" for name in BRANCHES)
LAYERS = (3 / 32, 28 / 32)
"""The published range, layers 3..27 of 32 and 4..34 of 40, as a share of the depth."""


@dataclasses.dataclass(frozen=True)
class Remember:
    """All tokens run; every branch leaves what it adds to the stream, after its gain."""

    name = "fastvar cache"
    reads = frozenset[str]()
    writes = MAPS

    def tokens(self, place: Place) -> None:
        return None

    def branch(
        self,
        name: str,
        run: Callable[[Any, Any], Any],
        stream: Stream,
        positions: Any,
        place: Place,
        state: LayerState,
    ) -> BranchOutput:
        """The branch on all tokens; its update is kept in the dtype of the branch."""
        out = run(stream, positions)
        return BranchOutput(out, {f"{name} update": out.update().astype(out.branch.dtype)})


@dataclasses.dataclass(frozen=True)
class Liveliest:
    """In every branch the tokens furthest from the mean run; `dropped` is the share of the others.

    Rows choose for themselves. source: the (height, width) of the scale whose updates fill in.
    """

    dropped: float
    source: tuple[int, int]

    reads = MAPS
    writes = frozenset[str]()

    def __post_init__(self):
        if not 0 <= self.dropped < 1:
            raise ValueError(f"fastvar drops a share of the tokens in [0, 1), got {self.dropped}")

    @property
    def name(self) -> str:
        return f"fastvar {self.dropped:g}"

    def tokens(self, place: Place) -> int:
        return place.scale.tokens - int(self.dropped * place.scale.tokens)

    def choose(self, name: str, x: Float[Array, "R T C"], place: Place) -> Int[Array, "R T2"]:
        """Which tokens run a branch, in the order of their places."""
        _, kept = jax.lax.top_k(liveliness(x), self.tokens(place))
        return jnp.sort(kept, axis=-1)

    def branch(
        self,
        name: str,
        run: Callable[[Any, Any], Any],
        stream: Stream,
        positions: Any,
        place: Place,
        state: LayerState,
    ) -> BranchOutput:
        """The branch on its chosen tokens; every other place gets the cache scale's update."""
        x = stream.settled()
        kept = self.choose(name, x, place)
        rows = jnp.arange(len(x))[:, None]
        positions = jax.tree.map(lambda table: _of_tokens(table, kept), positions)
        update = run(Stream(x[rows, kept]), positions).update()
        old = resized(state[f"{name} update"][: len(x)], self.source, place)
        return BranchOutput(Stream(updated(x, old.at[rows, kept].set(update))))


def liveliness(x: Float[Array, "R T C"]) -> Float[Array, "R T"]:
    """Squared distance of every token from the mean of its row, float32."""
    x = x.astype(jnp.float32)
    return jnp.square(x - x.mean(axis=1, keepdims=True)).sum(axis=-1)


def resized(
    update: Float[Array, "R T0 C"], source: tuple[int, int], place: Place
) -> Float[Array, "R T C"]:
    """A scale's map on the grid of another by adaptive means ("area"), float32."""
    rows, _, width = update.shape
    grid = update.astype(jnp.float32).reshape(rows, *source, width)
    scale = place.scale
    return quantizer.resize(grid, (scale.height, scale.width), "area").reshape(rows, -1, width)


def _of_tokens(table: jax.Array, kept: Int[Array, "R T2"]) -> jax.Array:
    """Rows of a table [T, D] or [R, T, D] that belong to the kept tokens."""
    if table.ndim == 2:
        return table[kept]
    return jnp.take_along_axis(table, kept[..., None], axis=1)


@checked
def fastvar(
    dropped: tuple[tuple[int, float], ...] = ((-4, 0.4), (-3, 0.5)),
    cache: int = -5,
    skip: int = 2,
    *,
    layers: Layers = LAYERS,
) -> Policy:
    """Cached token pruning as FastVAR ships it: 40 and 50 % of two scales, and two scales skipped.

    dropped: (scale, share of its tokens that do not run) pairs. cache: the scale whose updates fill
    in. skip: last scales that are not drawn. Numbers of scales count from the end if negative; any
    grid and any batch will do. Conditional and unconditional rows choose apart, as published.
    Raises ValueError where a scale is not later than the cache scale, or where a layer has a rule
    about its tokens already.
    """

    def apply(plan: Plan) -> Plan:
        source = plan.schedule.scales[scale_index(plan.schedule, cache)]
        shares = {scale_index(plan.schedule, scale): share for scale, share in dropped}
        early = sorted(scale for scale in shares if scale <= source.index)
        if early:
            raise ValueError(
                f"fastvar drops tokens of scale {early[0]}, but what fills in comes from scale "
                f"{source.index}: drop tokens of later scales only"
            )
        start, stop = layer_range(layers, plan.depth)

        def change(step: Step, layer: int, old: Segment) -> Segment:
            index = step.scale.index
            chosen = index == source.index or index in shares
            if not (chosen and start <= layer < stop):
                return old
            if not isinstance(old.tokens, AllTokens):
                raise ValueError(
                    f"scale {index}, layer {layer}: fastvar would replace the token rule "
                    f"{old.tokens.name}; give the two different layers"
                )
            rule = (
                Remember()
                if index == source.index
                else Liveliest(shares[index], (source.height, source.width))
            )
            return dataclasses.replace(old, tokens=rule)

        return map_segments(skip_last_scales(skip)(plan), change)

    return apply
