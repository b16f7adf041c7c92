"""How a layer keeps its keys and values from scale to scale: the third plug point of a segment.

What a layer keeps is a pytree of the store's own, so a store may give rows up, quantise them, or
keep them in buffers that all of its layers share. In every array rows lead and heads follow.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from sparvar_jax.plans.rows import RowMap, Slot
from sparvar_jax.plans.strategy import Place, View

Write = Callable[[jax.Array, jax.Array, Slot], tuple[jax.Array, jax.Array, jax.Array]]
"""(key buffer, value buffer, slot) -> this scale's queries [R, H, T, D] and the updated buffers."""


@dataclasses.dataclass(frozen=True)
class Writes:
    """What writes a scale's keys and values, with what a store may want to know besides.

    queries: the scale's products with the query matrix alone, [R, H, T, D]: without bias, norm,
    temperature and position.
    """

    run: Write
    queries: Callable[[], jax.Array]

    def __call__(
        self, k: jax.Array, v: jax.Array, slot: Slot
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        return self.run(k, v, slot)


ReadLater = Callable[[int], frozenset[int]]
"""step -> the scales whose rows a layer reads after it."""


class CacheShape(NamedTuple):
    """What every layer's cache has in common. rows: of the batch, guidance included."""

    rows: int
    heads: int
    head_dim: int
    dtype: Any

    def buffer(self, length: int) -> Float[Array, "R H S D"]:
        """A zeroed buffer of `length` cache rows."""
        return jnp.zeros((self.rows, self.heads, length, self.head_dim), self.dtype)


@runtime_checkable
class Store(Protocol):
    """What stays of a layer's keys and values, and how attention sees it.

    All methods but `bind` are asked of the bound store.
    """

    @property
    def name(self) -> str: ...

    def bind(self, later: ReadLater) -> Store:
        """This store for one layer of a plan. later: what the layer reads after a step.

        A store that gives nothing up returns itself, so that plans share compiled steps.
        """
        ...

    def rows(self, whole: RowMap, index: int) -> RowMap:
        """The rows that attention sees at scale `index`; whole: where nothing is given up."""
        ...

    def start(self, shape: CacheShape, whole: RowMap) -> Any:
        """What a layer keeps before the first scale; every array is a buffer of its own."""
        ...

    def shared(self, shape: CacheShape, wholes: tuple[RowMap, ...]) -> Any:
        """Buffers that all layers with this store hand on to each other; () for none.

        wholes: of every such layer; a token rule gives some fewer rows than others.
        """
        ...

    def write(self, kept: Any, shared: Any, write: Write, place: Place) -> tuple[jax.Array, Any]:
        """The queries of this scale, and what the layer holds while it attends."""
        ...

    def view(self, held: Any, place: Place) -> View:
        """What attention sees."""
        ...

    def keep(self, held: Any, q: Float[Array, "R H T D"], place: Place) -> tuple[Any, Any]:
        """What the layer keeps for later scales, and the shared buffers for the next layer."""
        ...


@dataclasses.dataclass(frozen=True)
class Full:
    """Every key and value of every scale, in one pair of buffers a layer."""

    name = "full"

    def bind(self, later: ReadLater) -> Full:
        return self

    def rows(self, whole: RowMap, index: int) -> RowMap:
        return whole

    def start(self, shape: CacheShape, whole: RowMap) -> View:
        return View(shape.buffer(whole.total), shape.buffer(whole.total))

    def shared(self, shape: CacheShape, wholes: tuple[RowMap, ...]) -> tuple[()]:
        return ()

    def write(self, kept: Any, shared: Any, write: Write, place: Place) -> tuple[jax.Array, Any]:
        q, k, v = write(kept.k, kept.v, place.rows.slot(place.index))
        return q, View(k, v)

    def view(self, held: Any, place: Place) -> View:
        return held

    def keep(self, held: Any, q: Float[Array, "R H T D"], place: Place) -> tuple[Any, Any]:
        return held, ()


def write_rows(
    cache: Float[Array, "Rk H S D"], new: Float[Array, "R H T D"], slot: Slot
) -> Float[Array, "Rk H S D"]:
    """The buffer with one scale written to its first R rows.

    Grid rows are padded with zeros up to the slot's pitch, and `slot.clear` rows after the grid are
    zeroed. Callers donate the buffer, so that the update happens in place.
    """
    new = new.astype(cache.dtype)
    if slot.pitch != slot.width:
        rows, heads, tokens, head_dim = new.shape
        grid = new.reshape(rows, heads, tokens // slot.width, slot.width, head_dim)
        grid = jnp.pad(grid, ((0, 0),) * 3 + ((0, slot.pitch - slot.width), (0, 0)))
        new = grid.reshape(rows, heads, -1, head_dim)
    if slot.clear:
        new = jnp.pad(new, ((0, 0),) * 2 + ((0, slot.clear), (0, 0)))
    return jax.lax.dynamic_update_slice(cache, new, (0, 0, slot.start, 0))
