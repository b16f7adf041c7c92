"""A cache of 8 bits with a scale for every token and head, as a user would write it."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.plans.plan import with_store
from sparvar_jax.plans.stores import Full
from sparvar_jax.plans.strategy import View
from tests.house import support
from tests.house.support import DENSE, SCHEDULE, SHAPE, draw, held_bytes, same


class Quantised(NamedTuple):
    """int8 rows, and one scale a token and head."""

    k: jax.Array
    v: jax.Array
    k_scale: jax.Array
    v_scale: jax.Array


@dataclasses.dataclass(frozen=True)
class Int8(Full):
    """Keys and values in 8 bits, one float32 scale a token and head."""

    name = "int8"

    def start(self, shape, whole):
        def part(width, dtype):
            return jnp.zeros((*shape[:2], whole.total, width), dtype)

        rows, scales = (shape.head_dim, jnp.int8), (1, jnp.float32)
        return Quantised(part(*rows), part(*rows), part(*scales), part(*scales))

    def write(self, kept, shared, write, place):
        slot = place.rows.slot(place.index)
        room = jnp.zeros((*kept.k.shape[:2], place.rows.spans[place.index].rows + slot.clear,
                          kept.k.shape[3]), jnp.float32)  # fmt: skip
        q, *new = write(room, room, slot._replace(start=0))
        parts = [quantise(x) for x in new]
        arrays = parts[0][0], parts[1][0], parts[0][1], parts[1][1]
        held = (
            jax.lax.dynamic_update_slice(old, part, (0, 0, slot.start, 0))
            for old, part in zip(kept, arrays, strict=True)
        )
        return q, Quantised(*held)

    def view(self, held, place):
        return View(held.k * held.k_scale, held.v * held.v_scale)


def quantise(x):
    peak = jnp.abs(x).max(-1, keepdims=True)
    scale = jnp.where(peak > 0, peak / 127, 1)
    return jnp.round(x / scale).astype(jnp.int8), scale


def test_an_8_bit_cache_is_a_third_and_near(generator, plain):
    """A value is off by at most half a step of 1/127 of its row's peak.

    Keys are unit vectors of 32 parts whose logits are at most exp(log 4) = 4: a logit moves by at
    most 4 * sqrt(32) / 254 = 0.09, typically by a tenth of that; values, of order one, by 1/254.
    Two layers pass it on; raw logits are of order one.
    """
    plan = with_store(DENSE, Int8())
    forced = tuple(output.tokens for output in plain[1])
    _, outputs = draw(generator, plan, capture=True, forced=forced)
    errors = [
        float(jnp.abs(ours.captured["raw_logits"] - theirs.captured["raw_logits"]).max())
        for ours, theirs in zip(outputs, plain[1], strict=True)
    ]
    assert 0 < max(errors) < 0.09
    assert cache_bytes(plan, SHAPE) / cache_bytes(DENSE, SHAPE) == (32 + 4) / (32 * 4)
    assert held_bytes(generator.start(plan, support.BATCH)) == cache_bytes(plan, SHAPE)


@dataclasses.dataclass(frozen=True)
class OnGrid(Full):
    """Float rows, which are put on the grid of 8 bits as they are written."""

    name = "on grid"

    def write(self, kept, shared, write, place):
        q, held = super().write(kept, shared, write, place)
        rows = place.rows.rows(place.index)

        def put(x):
            values, scale = quantise(x[:, :, rows])
            return x.at[:, :, rows].set(values * scale)

        return q, View(*map(put, held))


def test_values_on_the_grid_lose_nothing_in_8_bits(generator):
    """Whole numbers up to 127 times a float32 scale: the product that floats hold is made again."""
    same(draw(generator, with_store(DENSE, Int8())), draw(generator, with_store(DENSE, OnGrid())))


def test_an_8_bit_row_is_off_by_half_a_step_at_most(generator, plain):
    """With the same tokens the first layer is given the same rows, whatever caches hold.

    Rounding to the grid moves a value by half a scale; the division before it and the product
    after it by one rounding each of values of up to 127 scales, 127 * 2^-23 in all.
    """
    forced = tuple(output.tokens for output in plain[1])
    ends = []
    for plan in (DENSE, with_store(DENSE, Int8())):
        *_, last = generator.steps(plan, *support.arguments(generator.model), forced=forced)
        ends.append(jax.tree.map(np.array, last[0].cache[0]))
        generator.release()
    exact, held = ends
    assert {held.k.dtype, held.v.dtype} == {np.dtype(np.int8)}
    for true, values, scale in ((exact.k, held.k, held.k_scale), (exact.v, held.v, held.v_scale)):
        true, values, scale = (
            np.float64(x[:, :, : SCHEDULE.tokens]) for x in (true, values, scale)
        )
        steps = np.abs(values * scale - true) / scale
        assert 0.4 < steps.max() <= 0.5 + 127 * 2**-23


def test_one_layer_keeps_one_store():
    steps = list(with_store(DENSE, Int8()).steps)
    steps[2] = DENSE.steps[2]
    with pytest.raises(ValueError, match="the store is full, at scale 0 it was int8"):
        dataclasses.replace(DENSE, steps=tuple(steps))
