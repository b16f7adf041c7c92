"""A cache of 8-bit keys and values, made dense in a scratch of all layers before attention.

Which values share a scale is a choice of the store; `python -m benchmarks.cache_error` measures
what each costs. A scale that is being drawn is read as it was written; later ones read it rounded.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Int8

from sparvar_jax.plans.lean import Lean, layout, put
from sparvar_jax.plans.rows import RowMap
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.plans.strategy import Place, View

Form = Literal["token", "channel"]
"""Which values share a scale: those of one token and head, or those of one channel in a block of
neighbouring tokens of one head."""
BLOCK = 64
"""Cache rows of a block; blocks begin anew at every scale."""
LEVELS = 127.0


class Quantised(NamedTuple):
    """8-bit rows with float32 scales: [R, H, S, 1] by token, [R, H, blocks, D] by channel."""

    values: Int8[Array, "Rk H S D"]
    scale: Float[Array, "Rk H S2 D2"]


class Kept(NamedTuple):
    """What a layer keeps."""

    k: Quantised
    v: Quantised


@dataclasses.dataclass(frozen=True)
class EightBits(Lean):
    """8 bits for every key and value that a later scale reads.

    keys, values: which of them share a scale. Symmetric: a scale is the largest magnitude / 127.
    """

    keys: Form = "channel"
    values: Form = "channel"

    name = "int8"

    @property
    def forms(self) -> tuple[Form, Form]:
        return self.keys, self.values

    def start(self, shape: CacheShape, whole: RowMap) -> Kept:
        length = layout(whole, self.kept).total
        rows = [whole.spans[scale].rows for scale in self.kept]
        blocks = sum(_blocks(number) for number in rows)

        def buffer(form: Form) -> Quantised:
            scales = (length, 1) if form == "token" else (blocks, shape.head_dim)
            lead = shape.rows, shape.heads
            return Quantised(
                jnp.zeros((*lead, length, shape.head_dim), jnp.int8),
                jnp.zeros((*lead, *scales), jnp.float32),
            )

        return Kept(*map(buffer, self.forms))

    def in_place(self, place: Place) -> bool:
        """Never: what is kept is not what attention reads."""
        return False

    def save(self, kept: Any, scratch: View, rows: int, place: Place) -> Any:
        span = place.rows.spans[place.index]
        number = self.kept.index(place.index)
        at = layout(place.rows, self.kept).starts[number]
        block = self._first_block(place.rows, number)

        def one(old: Quantised, part: jax.Array, form: Form) -> Quantised:
            new = quantise(part[:rows, :, span.start : span.stop], form)
            first = at if form == "token" else block
            return Quantised(put(old.values, new.values, at), put(old.scale, new.scale, first))

        return Kept(*map(one, kept, scratch, self.forms))

    def load(self, kept: Any, scratch: View, rows: int, place: Place) -> View:
        blocks = blocks_of_rows(place.rows, self.kept)

        def one(buffer: jax.Array, held: Quantised, form: Form) -> jax.Array:
            for run in self.runs(place.rows, place.index):
                here = slice(run.kept, run.kept + run.rows)
                of = np.arange(run.kept, here.stop) if form == "token" else blocks[here]
                part = Quantised(held.values[:rows, :, here], held.scale[:rows])
                buffer = put(buffer, dense(part, of), run.whole)
            return buffer

        return View(*map(one, scratch, kept, self.forms))

    def _first_block(self, whole: RowMap, number: int) -> int:
        return sum(_blocks(whole.spans[scale].rows) for scale in self.kept[:number])


def quantise(rows: Float[Array, "R H T D"], form: Form) -> Quantised:
    """Rows to the nearest of 255 levels; those that share a scale reach at most the outermost."""
    exact = rows.astype(jnp.float32)
    if form == "token":
        scale = _scale(jnp.abs(exact).max(-1, keepdims=True))
        return Quantised(jnp.round(exact / scale).astype(jnp.int8), scale)
    lead, tokens, width = exact.shape[:2], exact.shape[2], exact.shape[3]
    blocks = _blocks(tokens)
    padded = jnp.pad(exact, ((0, 0), (0, 0), (0, blocks * BLOCK - tokens), (0, 0)))
    peaks = jnp.abs(padded).reshape(*lead, blocks, BLOCK, width).max(3)
    scale = _scale(peaks)
    spread = jnp.repeat(scale, BLOCK, axis=2)[:, :, :tokens]
    return Quantised(jnp.round(exact / spread).astype(jnp.int8), scale)


def dense(rows: Quantised, of: Int[np.ndarray, "T"]) -> Float[Array, "R H T D"]:
    """The values in float32. of: which scale every row has."""
    first, last = int(of[0]), int(of[-1]) + 1
    scale = rows.scale[:, :, first:last]
    if last - first != len(of):
        scale = jnp.take(scale, of - first, axis=2)
    return rows.values.astype(jnp.float32) * scale


@functools.lru_cache
def blocks_of_rows(whole: RowMap, kept: tuple[int, ...]) -> Int[np.ndarray, "S"]:
    """The block of every kept row; rows between scales count to the one before."""
    places, first = layout(whole, kept), 0
    blocks = np.zeros(places.total, np.int32)
    for start, scale in zip(places.starts, kept, strict=True):
        rows = whole.spans[scale].rows
        blocks[start : start + rows] = first + np.arange(rows) // BLOCK
        first += _blocks(rows)
        blocks[start + rows :] = first - 1
    return blocks


def _scale(peak: Float[Array, "..."]) -> Float[Array, "..."]:
    return jnp.where(peak > 0, peak / LEVELS, 1.0)


def _blocks(rows: int) -> int:
    return -(-rows // BLOCK)
