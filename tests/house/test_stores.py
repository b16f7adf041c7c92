"""Stores of users: the last scale in a buffer of all layers, a budget of rows, an 8-bit cache."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.plans.plan import dense_plan, with_store
from sparvar_jax.plans.rows import RowMap, Slot, Span
from sparvar_jax.plans.stores import CacheShape, Full
from sparvar_jax.plans.strategy import View
from sparvar_jax.policies import parse_plan, skip_last_scales
from sparvar_jax.runtime.generate import Generator
from tests.house import support
from tests.house.support import SCHEDULE, draw

# The budget's buffers grow from scale to scale, so that none can be updated in place.
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")
SHAPE = CacheShape(4, 2, 32, jnp.dtype("float32"))
DENSE = dense_plan(SCHEDULE, 2)


@pytest.fixture(scope="module")
def generator():
    return Generator(support.model())


@pytest.fixture(scope="module")
def plain(generator):
    return draw(generator, DENSE, capture=True)


def same(ours, theirs):
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)


@dataclasses.dataclass(frozen=True)
class LastShared(Full):
    """The rows of a scale that nothing reads later lie in buffers that all layers share."""

    last: int | None = None
    name = "last shared"

    def bind(self, later):
        index = 0
        while later(index):
            index += 1
        return dataclasses.replace(self, last=index)

    def _split(self, rows):
        span = rows.spans[self.last]
        return span.start, -(-span.stop // 128) * 128 - span.start

    def start(self, shape, whole):
        first, _ = self._split(whole)
        return View(shape.buffer(first), shape.buffer(first))

    def shared(self, shape, whole):
        _, own = self._split(whole)
        return View(shape.buffer(own), shape.buffer(own))

    def write(self, kept, shared, write, place):
        slot = place.rows.slot(place.index)
        if place.index < self.last:
            room = len_of(kept) - slot.start - place.rows.spans[place.index].rows
            q, *new = write(*kept, slot._replace(clear=min(slot.clear, room)))
            return q, (View(*new), shared)
        q, *new = write(*shared, slot._replace(start=0))
        return q, (kept, View(*new))

    def view(self, held, place):
        if place.index < self.last:
            return View(*(jnp.pad(x, padding(x, place)) for x in held[0]))
        return View(*(jnp.concatenate(pair, 2) for pair in zip(*held, strict=True)))

    def keep(self, held, q, place):
        return held


def len_of(view):
    return view.k.shape[2]


def padding(x, place):
    return (0, 0), (0, 0), (0, max(place.kv_length - x.shape[2], 0)), (0, 0)


@pytest.mark.parametrize("skipped", [0, 1])
def test_the_last_scale_in_a_shared_buffer_draws_the_same_bits(generator, skipped):
    plan = skip_last_scales(skipped)(DENSE)
    lean = with_store(plan, LastShared())
    same(draw(generator, lean), draw(generator, plan))
    last = plan.steps[-1].scale
    assert lean.store(0) == LastShared(last.index)
    shared = -(-last.end // 128) * 128 - last.offset
    assert cache_bytes(lean, SHAPE) == (2 * last.offset + shared) * 2 * 4 * 4 * 2 * 32
    assert cache_bytes(lean, SHAPE) < cache_bytes(plan, SHAPE)
    assert "dense, last shared" in lean.describe()


@dataclasses.dataclass(frozen=True)
class Budget(Full):
    """Of every finished scale each layer and head keeps the `most` rows with the longest values."""

    most: int = 8
    name = "budget"

    def rows(self, whole, index):
        spans, stop = [], 0
        for number, span in enumerate(whole.spans):
            rows = span.rows if number >= index else min(self.most, span.rows)
            cut = span if rows == span.rows else Span(0, rows, None, rows, "traced")
            spans.append(dataclasses.replace(cut, start=stop))
            stop += rows
        name = "traced" if any(span.visible == "traced" for span in spans) else whole.name
        return RowMap(name, tuple(spans), -(-stop // 128) * 128)

    def start(self, shape, whole):
        return View(shape.buffer(0), shape.buffer(0))

    def write(self, kept, shared, write, place):
        span = place.rows.spans[place.index]
        room = jnp.zeros((*kept.k.shape[:2], span.rows, kept.k.shape[3]), kept.k.dtype)
        q, *new = write(room, room, Slot(0, span.size[1], span.pitch))
        return q, (kept, View(*new))

    def view(self, held, place):
        return View(*(jnp.concatenate(pair, 2) for pair in zip(*held, strict=True)))

    def keep(self, held, q, place):
        kept, new = held
        norms = jnp.linalg.norm(new.v, axis=-1)
        chosen = jnp.sort(jax.lax.top_k(norms, min(self.most, norms.shape[-1]))[1])[..., None]
        cut = (jnp.take_along_axis(x, chosen, 2) for x in new)
        return View(*(jnp.concatenate(pair, 2) for pair in zip(kept, cut, strict=True))), ()


def test_a_budget_of_everything_draws_the_same_bits(generator, plain):
    same(draw(generator, with_store(DENSE, Budget(80))), plain)


def test_a_budget_keeps_so_many_rows_of_every_scale(generator, plain):
    """The first two scales hold at most four tokens: up to the third nothing is given up."""
    plan = with_store(DENSE, Budget(4))
    steps = generator.steps(plan, *support.arguments(generator.model), capture=True)
    for index, (state, output) in enumerate(steps):
        held = sum(min(4, scale.tokens) for scale in SCHEDULE.scales[: index + 1])
        assert {x.shape[2] for x in jax.tree.leaves(state.cache)} == {held}
        error = output.captured["raw_logits"] - plain[1][index].captured["raw_logits"]
        if index < 3:
            np.testing.assert_array_equal(error, 0)
        else:
            assert float(jnp.abs(error).max()) > 1e-3
    place = plan.place(3, 1)
    assert place.kv_length == 1 + 4 + 4 + 80
    assert place.dense_pairs == 80 * 89
    assert plan.density(1) == pytest.approx(89 / 105)


def test_what_needs_grids_is_refused_over_a_budget():
    with pytest.raises(ValueError, match=r"scale 3, layers 0\.\.2: csla .* traced cache layout"):
        with_store(parse_plan("csla(first_scale=3)", SCHEDULE, 2), Budget(4))


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


def test_one_layer_keeps_one_store():
    steps = list(with_store(DENSE, Int8()).steps)
    steps[2] = DENSE.steps[2]
    with pytest.raises(ValueError, match="the store is full, at scale 0 it was int8"):
        dataclasses.replace(DENSE, steps=tuple(steps))


def test_stores_differ_by_layer_and_share_what_is_alike(generator, plain):
    mixed = with_store(DENSE, LastShared(), layers=(1, 2))
    assert [s.layers for s in mixed.steps[0].segments] == [(0, 1), (1, 2)]
    same(draw(generator, mixed), plain)
