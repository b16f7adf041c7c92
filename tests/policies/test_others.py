"""Other ways to draw less: what keeps everything changes nothing, the rest does what it says."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies import head_orders, parse_plan
from sparvar_jax.policies.per_head import with_orders
from sparvar_jax.runtime import generate
from tests.house.support import lively

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (4, 4), (8, 8), (8, 12), (12, 16)))
CONFIG = InfinityConfig(3, 64, 2, text_width=128, bits=8, dtype="float32")
DENSE = dense_plan(SCHEDULE, 3)
ORDERS = head_orders.HeadOrders(
    3, 2, 2, tuple(tuple(np.random.default_rng(n).permutation(6).tolist()) for n in range(3))
)
pytestmark = pytest.mark.filterwarnings("ignore:Some donated buffers were not usable")


def plan_of(text):
    return parse_plan(text, SCHEDULE, 3)


@functools.cache
def generator():
    return generate.Generator(lively(Infinity, CONFIG))


@functools.cache
def arguments(batch=2):
    model = generator().model
    text = jax.random.normal(jax.random.key(1), (batch, 5, 128))
    lengths = jnp.arange(batch) % 3 + 3
    condition = jax.jit(lambda m: m.embed_condition(text, lengths, "learned"))(model)
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    return condition, controls, sampling.image_keys(0, batch)


def draw(plan, **options):
    return generator().run(plan, *arguments(), **options)


@functools.cache
def dense():
    return draw(DENSE)


def same(ours, theirs, scales=None):
    for one, other in list(zip(ours[1], theirs[1], strict=False))[:scales]:
        np.testing.assert_array_equal(one.tokens, other.tokens)
    if scales is None:
        np.testing.assert_array_equal(ours[0], theirs[0])


EVERYTHING = (
    "fastvar(((-2, 0.0), (-1, 0.0)), -3, 0)",
    "prune(1.0, scales=(-2, -1), layers=(1, 3))",
    "share_rows(0)",
    "drop_uncond(0, ((-1, 1.0),))",
    "guidance_range(0, 6)",
    "scalekv(keep=1.0)",
)


@pytest.mark.parametrize("text", EVERYTHING)
def test_keeping_everything_draws_the_same_bits(text):
    same(draw(plan_of(text)), dense())


@pytest.mark.parametrize("free", [True, False])
def test_heads_that_see_everything_draw_the_same_bits(free):
    same(draw(with_orders(DENSE, ORDERS, 1.0, free=free)), dense())
