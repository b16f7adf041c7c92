"""Pruning by whole patches: late scales run the part of the grid whose latent changed most.

One choice a scale, made on the device before the segment starts and shared by the rows of guidance
and by all its layers, so kernels see an ordinary, shorter scale. Codes of tokens that do not run
are left out of the picture: a code has a fixed length, and none is the neutral answer.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sparvar_jax.models import quantizer
from sparvar_jax.plans.plan import Plan, Segment, Step, map_segments
from sparvar_jax.plans.rows import LayoutName
from sparvar_jax.plans.stores import write_rows
from sparvar_jax.plans.strategy import (
    KEPT,
    AllTokens,
    Attention,
    LayerState,
    Output,
    Place,
    ReadsAll,
    View,
)
from sparvar_jax.policies.arguments import checked
from sparvar_jax.policies.csla import Csla
from sparvar_jax.policies.indices import scale_index
from sparvar_jax.policies.routing import Layers, Policy, layer_range
from sparvar_jax.policies.sparvar import released_boundary

INPUT = "input codes"
Codes = Literal["zero", "draw"]


class Watched:
    """A rule that keeps the scale's input codes for the next one, [B, T, N]."""

    writes = frozenset({INPUT})

    def watch(
        self, x: Float[Array, "R T C"], codes: Float[Array, "B T N"] | None, place: Place
    ) -> Mapping[str, jax.Array]:
        """The input codes."""
        assert codes is not None
        return {INPUT: codes}

    def restore(
        self,
        before: Float[Array, "R T C"],
        after: Float[Array, "R T2 C"],
        kept: Int[Array, "R T2"],
        place: Place,
        state: LayerState,
    ) -> tuple[Float[Array, "R T C"], Mapping[str, jax.Array]]:
        """Tokens that did not run keep what entered the segment."""
        return before.at[jnp.arange(len(before))[:, None], kept].set(after), {}


@dataclasses.dataclass(frozen=True)
class Whole(Watched):
    """All tokens of the scale before a pruned one run."""

    name = "watch"
    reads = frozenset[str]()

    def tokens(self, place: Place) -> None:
        return None

    def select(
        self,
        x: Float[Array, "R T C"],
        codes: Float[Array, "B T N"] | None,
        place: Place,
        state: LayerState,
    ) -> None:
        return None


@dataclasses.dataclass(frozen=True)
class Patches(Watched):
    """The share of the grid that changed most runs, in patches of `tile` (height, width).

    The change is that of the code sum at the scale before, on this grid. codes: "zero" leaves the
    codes of the others out, "draw" draws them from what enters the segment.
    """

    share: float
    tile: tuple[int, int] = (4, 4)
    codes: Codes = "zero"

    reads = frozenset({INPUT})

    def __post_init__(self):
        if not 0 < self.share <= 1:
            raise ValueError(f"prune keeps a share of the tokens in (0, 1], got {self.share}")
        if self.tile not in ((4, 4), (8, 16)):
            raise ValueError(f"prune takes tiles of 4x4 or 8x16 tokens, got {self.tile}")
        if self.codes not in ("zero", "draw"):
            raise ValueError(f"codes must be 'zero' or 'draw', got {self.codes!r}")

    @property
    def name(self) -> str:
        return f"prune {self.share:g} by {self.tile[0]}x{self.tile[1]}"

    def tokens(self, place: Place) -> int:
        """The share, rounded up to whole tiles."""
        unit, all_tokens = math.prod(self.tile), place.scale.tokens
        return min(math.ceil(self.share * all_tokens / unit) * unit, all_tokens)

    def select(
        self,
        x: Float[Array, "R T C"],
        codes: Float[Array, "B T N"] | None,
        place: Place,
        state: LayerState,
    ) -> Int[Array, "R T2"]:
        """The same tokens for both rows of a picture: those of the tiles that changed most."""
        assert codes is not None
        change = latent_change(codes, state[INPUT], place)
        tiles = self._tiles(place)
        total = jax.ops.segment_sum(change.T, tiles, num_segments=int(tiles.max()) + 1).T
        order = jnp.argsort(-total / np.bincount(tiles), axis=-1)
        rank = jnp.argsort(order, axis=-1)
        _, kept = jax.lax.top_k(-rank[:, tiles], self.tokens(place))
        kept = jnp.sort(kept, axis=-1).astype(jnp.int32)
        return jnp.tile(kept, (len(x) // len(kept), 1))

    def _tiles(self, place: Place) -> Int[np.ndarray, "T"]:
        """The tile of every token; tiles at the lower and right border may be cut."""
        scale, (height, width) = place.scale, self.tile
        across = -(-scale.width // width)
        rows, columns = np.divmod(np.arange(scale.tokens), scale.width)
        return rows // height * across + columns // width

    def drawn(
        self, kept: Int[Array, "R T2"], place: Place, batch: int
    ) -> Bool[Array, "B T"] | None:
        """The tokens that ran; None where all codes are drawn."""
        if self.codes == "draw":
            return None
        none = jnp.zeros((batch, place.scale.tokens), bool)
        return none.at[jnp.arange(batch)[:, None], kept[:batch]].set(True)


def latent_change(
    codes: Float[Array, "B T N"], earlier: Float[Array, "B T0 N"], place: Place
) -> Float[Array, "B T"]:
    """Squared change of a scale's input codes since the scale before, on this scale's grid."""
    scale, old = place.scale, place.schedule.scales[place.index - 1]
    grid = earlier.reshape(len(earlier), old.height, old.width, -1)
    before = quantizer.resize(grid, (scale.height, scale.width)).reshape(codes.shape)
    return jnp.square(codes - before).sum(-1)


@dataclasses.dataclass(frozen=True)
class OnGrid(ReadsAll):
    """Windows under a pruned scale: queries and keys are laid back onto their grid.

    Keys of tokens that did not run are those of their place at the scale before, whose rotated
    position differs by at most one. Attention then costs what it costs unpruned.
    """

    inner: Csla

    @property
    def name(self) -> str:
        return f"{self.inner.name} on grid"

    @property
    def layouts(self) -> tuple[LayoutName, ...]:  # type: ignore[override]
        return ("traced",)

    def pairs(self, place: Place) -> float:
        return self.inner.pairs(_whole(place)) * place.queries / place.scale.tokens

    def scales(self, place: Place) -> frozenset[int]:
        return self.inner.scales(_whole(place)) | {place.index - 1}

    def __call__(
        self, view: View, q: Float[Array, "R H T D"], place: Place, state: LayerState
    ) -> Output:
        """The inner attention's result at the tokens that run."""
        whole, kept, index = _whole(place), state[KEPT][: len(q)], place.index
        if place.rows.spans[:index] != whole.rows.spans[:index]:
            raise ValueError(
                f"scale {index}: {self.inner.name} needs earlier scales on their grids: prune the "
                "last scale alone where windows look"
            )
        nearest, span = _nearest(whole), whole.rows.spans[index - 1]
        rows = span.start + nearest // span.size[1] * span.pitch + nearest % span.size[1]
        full = []
        for x in view:
            x = x[: len(q)]
            own = x[:, :, place.rows.spans[index].start :][:, :, : place.queries]
            grid = _put(x[:, :, rows], kept, own)
            room = jnp.pad(x, ((0, 0), (0, 0), (0, whole.rows.total - x.shape[2]), (0, 0)))
            full.append(write_rows(room, grid, whole.rows.slot(index)))
        empty = jnp.zeros((*q.shape[:2], place.scale.tokens, q.shape[3]), q.dtype)
        out = self.inner(View(*full), _put(empty, kept, q), whole, {}).out
        return Output(jnp.take_along_axis(out, kept[:, None, :, None], axis=2))


def _put(
    grid: Float[Array, "R H T D"], kept: Int[Array, "R T2"], part: Float[Array, "R H T2 D"]
) -> Float[Array, "R H T D"]:
    row, tokens = jnp.arange(len(grid))[:, None], grid.swapaxes(1, 2)
    return tokens.at[row, kept].set(part.swapaxes(1, 2).astype(grid.dtype)).swapaxes(1, 2)


def _whole(place: Place) -> Place:
    """The place where all tokens run."""
    rows = place.schedule.layout(place.layout_name)
    return dataclasses.replace(place, rows=rows, kept=None)


def _nearest(place: Place) -> Int[np.ndarray, "T"]:
    """For every token the one of the scale before that lies at its place."""
    scale, old = place.scale, place.schedule.scales[place.index - 1]
    y = (np.arange(scale.height) * old.height) // scale.height
    x = (np.arange(scale.width) * old.width) // scale.width
    return (y[:, None] * old.width + x).reshape(-1)


@checked
def prune(
    share: float = 0.4,
    tile: tuple[int, int] = (4, 4),
    *,
    scales: tuple[int, ...] = (-1,),
    layers: Layers = None,
    codes: Codes = "zero",
) -> Policy:
    """Run a share of the tokens of late scales in the later layers, chosen by latent change.

    tile: whole patches of 4x4 or 8x16 tokens. scales: counted from the end if negative. layers:
    [start, stop), by default those above SparVAR's boundary. codes: of the other tokens, "zero" or
    "draw". Windows (`csla`) in these layers go on, on the grid, if given before this policy and if
    only the last scale drawn is pruned; other sparse attentions are refused.
    """
    rule = Patches(share, (tile[0], tile[1]), codes)

    def apply(plan: Plan) -> Plan:
        above = released_boundary(plan.depth) + 1
        start, stop = layer_range(layers or (above, plan.depth), plan.depth)
        pruned = {scale_index(plan.schedule, scale) for scale in scales}
        if min(pruned) < 2:
            raise ValueError(
                f"prune looks at the change of the scale before, got scale {min(pruned)}: prune "
                "scales from 2 on"
            )

        def change(step: Step, layer: int, old: Segment) -> Segment:
            index = step.scale.index
            if not start <= layer < stop or not {index, index + 1} & pruned:
                return old
            if not isinstance(old.tokens, AllTokens):
                raise ValueError(
                    f"scale {index}, layer {layer}: prune would replace the token rule "
                    f"{old.tokens.name}; give the two different layers"
                )
            if index not in pruned:
                return dataclasses.replace(old, tokens=Whole())
            return dataclasses.replace(old, tokens=rule, attention=_on_grid(old.attention))

        return map_segments(plan, change)

    return apply


def _on_grid(attention: Attention) -> Attention:
    return OnGrid(attention) if isinstance(attention, Csla) else attention
