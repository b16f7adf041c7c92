"""When dividing tokens pays, against times that are worked out by hand."""

import pytest
from flax import nnx

from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime.split import Layer, Machine, forecast, pays, shape

# A million weights of two bytes: 2 ms to read; 1 ms a thousand tokens.
LAYER = Layer(weights=1_000_000, width=100, item=2)
SLOW = Machine(rate=2e12, memory=1e9, link=4e6, latency=1e-4)


def test_a_scale_takes_as_long_as_its_products_or_as_reading_the_weights():
    assert LAYER.seconds(1, SLOW) == LAYER.seconds(2000, SLOW) == pytest.approx(2e-3)
    assert LAYER.seconds(10_000, SLOW) == pytest.approx(10e-3)


def test_an_exchange_carries_what_belongs_to_others():
    """Of 4 x 100 numbers a token, of 2 bytes, a device of four sends three quarters of its own."""
    sent = 4 * 100 * 2 * 1000 * 3 / 4
    assert LAYER.exchange_seconds(4000, 4, SLOW) == pytest.approx(2e-4 + sent / 4e6)


@pytest.mark.parametrize(("tokens", "parts", "divided"), [
    (1000, 2, False),  # reading the weights takes longer than the products, divided or not
    (6000, 2, False),  # saves 3 ms; exchanges take 300 ms over so slow a link
])  # fmt: skip
def test_what_does_not_pay_is_not_divided(tokens, parts, divided):
    assert pays(LAYER, tokens, parts, SLOW) is divided


def test_a_faster_link_pays_from_where_the_gain_exceeds_latency():
    """Of T tokens on two devices half the products are saved, but never the reading of weights."""
    fast = Machine(rate=2e12, memory=1e9, link=1e12, latency=1e-4)
    assert not pays(LAYER, 2150, 2, fast)  # saves 0.15 ms of 2.15
    assert pays(LAYER, 2250, 2, fast)  # saves 0.25 ms, two exchanges take 0.2


@pytest.mark.parametrize(("devices", "pictures", "heads", "expected"), [
    (4, 1, 28, (1, 1, 4)), (4, 2, 28, (2, 1, 2)), (4, 8, 28, (4, 1, 1)), (3, 3, 28, (3, 1, 1)),
    (6, 4, 12, (2, 1, 3)),
])  # fmt: skip
def test_pictures_come_before_heads(devices, pictures, heads, expected):
    assert shape(devices, pictures, heads) == expected


@pytest.mark.parametrize(("plan", "expected"), [
    ("dense", (1, 2, 2)), ("sparvar-fast", (1, 2, 2)), ("drop_uncond(1)", (1, 1, 4)),
    ("share_rows(1)", (1, 1, 4)), ("prune(0.5)", (1, 1, 4)),
])  # fmt: skip
def test_rows_that_never_meet_before_the_head_come_next(plan, expected):
    square = ScaleSchedule.of(tuple((side, side) for side in (1, 2, 4, 8, 12, 16)))
    assert shape(4, 1, 28, parse_plan(plan, square, 6)) == expected
    assert shape(3, 1, 27, parse_plan(plan, square, 6)) == (1, 1, 3)


def test_heads_need_to_be_divided_over_what_guidance_leaves():
    plan = parse_plan("dense", ScaleSchedule.of(((1, 1), (2, 2))), 2)
    assert shape(8, 1, 28, plan) == (1, 2, 4)
    with pytest.raises(ValueError, match="over 8 devices"):
        shape(8, 1, 28)


def test_heads_that_cannot_be_divided_are_refused_with_the_possible_numbers():
    with pytest.raises(ValueError, match="over 3 devices: give one of 1, 2, 4, 7, 14, 28"):
        shape(3, 1, 28)


def test_a_forecast_adds_up_scales_and_layers():
    """A scale that reads weights, and one of 4,096 tokens, of conditional rows alone."""
    model = nnx.eval_shape(lambda: Infinity(InfinityConfig(2, 2048, 16), rngs=nnx.Rngs(0)))
    plan = parse_plan("drop_uncond(1)", ScaleSchedule.of(((1, 1), (64, 64))), 2)
    layer, machine, told = Layer.of(model), Machine(), forecast(model, plan, 1, (1, 1, 2))
    reading = layer.weights * 2 / machine.memory
    products = 2 * layer.weights * 4096 / machine.rate
    assert told.one == pytest.approx(2 * (reading + products))
    exchange = layer.exchange_seconds(4096, 2, machine)
    assert told.divided_from == 1
    assert told.many == pytest.approx(2 * (reading + products / 2 + exchange))
    alone = forecast(model, plan, 1, (1, 1, 1))
    assert (alone.divided_from, alone.many) == (None, alone.one)
    apart = forecast(model, parse_plan("dense", plan.schedule, 2), 1, (1, 2, 1))
    assert (apart.divided_from, apart.one) == (None, pytest.approx(2 * (reading + 2 * products)))
    assert apart.many == pytest.approx(2 * (reading + products))
