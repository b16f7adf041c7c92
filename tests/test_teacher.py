"""The one-pass forward and the cached, compiled loop must agree: two routes to the same logits."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.runtime import generate
from sparvar_jax.study.teacher import teacher_forced_logits

# Both routes are float32; logits of this model are of order 1 and pass two blocks of about 1e2-term
# sums, so 1e-5 leaves an order of magnitude over the rounding seen (2e-6).
TOLERANCE = 1e-5


@pytest.mark.parametrize(("layout", "scan"), [("packed", False), ("aligned", True)])
def test_one_pass_equals_cached_loop(layout, scan):
    config = InfinityConfig(2, 64, 2, text_width=128, bits=8, dtype="float32")
    model = Infinity(config, rngs=nnx.Rngs(0))
    schedule = infinity_schedule(1.25, "0.06M")
    text = jax.random.normal(jax.random.key(1), (2, 5, 128))
    lengths = jnp.array([3, 5])
    condition = jax.jit(lambda model: model.embed_condition(text, lengths, "learned"))(model)
    plan = dense_plan(schedule, 2, layout=layout)
    controls = generate.controls(len(schedule), guidance=2.0, temperature=1.0, top_p=1.0)
    codes, cached = [], []
    steps = generate.Generator(model).steps(
        plan, condition, controls, sampling.image_keys(0, 2), capture=True
    )
    for state, output in steps:
        cached.append(np.asarray(output.captured["raw_logits"]))
        if state.codes is not None:
            codes.append(jnp.array(state.codes))
    one_go = jax.jit(functools.partial(teacher_forced_logits, schedule=schedule, scan=scan))
    logits = one_go(model, condition, tuple(codes))
    for one_pass, loop in zip(logits, cached, strict=True):
        np.testing.assert_allclose(one_pass, loop, atol=TOLERANCE)
