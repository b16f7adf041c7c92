"""Plans run through the generation loop with a tiny model.

Tolerance: logits are of order one; sparse and dense paths sum in float32 in another order, two
layers deep: 1e-4 is some hundred units in the last place.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime import generate
from tests.house.support import embed

SCHEDULE = ScaleSchedule.of(((1, 1), (4, 3), (6, 5), (9, 7)))
DEPTH = 2
TOLERANCE = 1e-4
EVERYTHING = (
    "csla(windows=(99,), sinks=4)",
    "csla(windows=(99, 99, 99, 99), sinks=0, form='boxes')",
    "cs4a(keep=1.0, windows=(99,), group=24)",
    "cs4a(keep=1.0, windows=(99,), group=24, granularity=8, multiple=8)",
    "sparvar(0, columns_options={'keep': 1.0, 'windows': (99,)}, windows=(99,), sinks=4)",
    "adaptive(cap=1.0, floor=1.0, block=64)",
)
SPARSE = (
    "sparvar-paper + drop_uncond(2)",
    "sparvar-fast + drop_uncond(1)",
)
MORE_SPARSE = (
    "cs4a(group=24, multiple=8, mapping='relative') + drop_uncond(1)",
    "cs4a(group=24, multiple=8, mapping='scale', cache=False)",
    "adaptive(block=64, coverage=0.5) + drop_uncond(2)",
    "skip_last_scales(1) + csla(form='boxes', exact=True)",
)


@pytest.fixture(scope="module")
def world():
    config = InfinityConfig(DEPTH, 64, 2, text_width=128, bits=8, dtype="float32")
    generator = generate.Generator(Infinity(config, rngs=nnx.Rngs(0)))
    text = jax.random.normal(jax.random.key(1), (2, 5, 128)), jnp.array([3, 5])
    condition = embed(generator.model, *text)
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    keys = sampling.image_keys(0, 2)

    def run(text, **options):
        plan = parse_plan(text, SCHEDULE, DEPTH)
        return generator.run(plan, condition, controls, keys, capture=True, **options)

    return run


@pytest.fixture(scope="module")
def dense(world):
    return world("dense")


@pytest.mark.parametrize("plan", EVERYTHING)
def test_covering_everything_gives_the_dense_picture(world, dense, plan):
    tokens = tuple(output.tokens for output in dense[1])
    forced = world(plan, forced=tokens)
    for ours, theirs in zip(forced[1], dense[1], strict=True):
        error = ours.captured["guided_logits"] - theirs.captured["guided_logits"]
        assert float(jnp.abs(error).max()) < TOLERANCE
    np.testing.assert_array_equal(forced[0], dense[0])


def test_the_covering_plan_draws_the_same_bits(world, dense):
    np.testing.assert_array_equal(world(EVERYTHING[0])[0], dense[0])


@pytest.mark.parametrize(
    "plan", [*SPARSE, *(pytest.param(plan, marks=pytest.mark.slow) for plan in MORE_SPARSE)]
)
def test_sparse_plans_draw(world, dense, plan):
    code_sum, outputs = world(plan)
    assert bool(jnp.isfinite(code_sum).all())
    first = outputs[0].captured["guided_logits"] - dense[1][0].captured["guided_logits"]
    assert float(jnp.abs(first).max()) < TOLERANCE
    if "skip" in plan:
        assert len(outputs) == len(dense[1]) - 1
    else:
        last = outputs[-1].captured["guided_logits"] - dense[1][-1].captured["guided_logits"]
        assert float(jnp.abs(last).max()) > TOLERANCE
