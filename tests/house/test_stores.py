"""Stores of users: the last scale in a buffer of all layers, and a budget of rows."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.stream import Stream
from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.plans.plan import with_store
from sparvar_jax.plans.rows import RowMap, Slot, Span
from sparvar_jax.plans.stores import Full
from sparvar_jax.plans.strategy import Place, View
from sparvar_jax.policies import parse_plan, skip_last_scales
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.runtime.state import empty_buffers
from tests.house import support
from tests.house.support import DENSE, SCHEDULE, SHAPE, draw, held_bytes, lively, over_lists, same
from tests.house.test_token_rule import strongest

# The budget's buffers grow from scale to scale, so that none can be updated in place.
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


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

    def shared(self, shape, wholes):
        own = max(self._split(whole)[1] for whole in wholes)
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
    assert held_bytes(generator.start(lean, support.BATCH)) == cache_bytes(lean, SHAPE)
    assert "dense, last shared" in lean.describe()


def test_layers_of_fewer_rows_share_with_the_others(generator):
    """Half of scale 2 in layer 0: its own rows end at 15, those of layer 1 at 25.

    With scale 3 behind them, layer 0 reaches row 95 and needs 128 - 15 rows of the buffer; layer 1
    reaches 105 and needs 128 - 25. The buffer fits both, whichever comes first.
    """
    for layers in ((0, 1), (1, 2)):
        halved = strongest(DENSE, layers=layers, first=2)
        steps = (*halved.steps[:3], DENSE.steps[3])
        halved = dataclasses.replace(halved, steps=steps)
        lean = with_store(halved, LastShared())
        buffers = jax.eval_shape(lambda lean=lean: empty_buffers(lean, SHAPE))
        assert {x.shape[2] for x in jax.tree.leaves(buffers[1])} == {128 - 15}
    same(draw(generator, lean), draw(generator, halved))


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


@functools.partial(jax.jit, static_argnames=("place", "most"))
def budgeted_scale(model, condition, codes, past, *, place, most):
    """Raw logits of a scale with lists of keys, cut to the longest values once it is finished."""
    x = model.add_level(model.embed_codes(codes, condition), place)
    positions, lists = model.positions(condition, place), [list(layer) for layer in past]
    for layer, block in enumerate(model.blocks):
        inputs = model.block_inputs(layer, condition)
        attend = over_lists(lists[layer], x, support.CONFIG)
        x = block(Stream(x), inputs, positions, attend, support.CONFIG).settled()
        k, v = lists[layer][-1]
        order = jnp.argsort(-jnp.sum(v * v, -1), axis=-1)[..., :most]
        row, head = np.ogrid[: k.shape[0], : k.shape[1]]
        lists[layer][-1] = tuple(part[row[..., None], head[..., None], order] for part in (k, v))
    return model.head_logits(x, condition), tuple(tuple(layer) for layer in lists)


def test_a_budget_attends_to_what_lists_of_keys_hold():
    """Two blocks of about ten sums of at most 256 products: 20 * sqrt(256) roundings of 2^-24.

    The order in which kept keys lie is another one in the lists: a softmax does not know it.
    """
    transformer = lively(Infinity, support.CONFIG)
    condition, controls, keys = support.arguments(transformer)
    plan, codes, past = with_store(DENSE, Budget(4)), None, ((),) * 2
    steps = Generator(transformer).steps(plan, condition, controls, keys, capture=True)
    for index, (state, output) in enumerate(steps):
        raw, place = np.asarray(output.captured["raw_logits"]), Place(SCHEDULE, "packed", index)
        again, past = budgeted_scale(transformer, condition, codes, past, place=place, most=4)
        assert np.abs(raw).max() > 0.5
        tolerance = 20 * 16 * 2**-24 * np.abs(raw).max()
        np.testing.assert_allclose(raw, again, atol=tolerance, rtol=0)
        codes = state.codes


def test_what_needs_grids_is_refused_over_a_budget():
    with pytest.raises(ValueError, match=r"scale 3, layers 0\.\.2: csla .* traced cache layout"):
        with_store(parse_plan("csla(first_scale=3)", SCHEDULE, 2), Budget(4))


def test_stores_differ_by_layer_and_share_what_is_alike(generator, plain):
    mixed = with_store(DENSE, LastShared(), layers=(1, 2))
    assert [s.layers for s in mixed.steps[0].segments] == [(0, 1), (1, 2)]
    same(draw(generator, mixed), plain)
