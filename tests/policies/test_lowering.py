"""Every strategy lowers for a CUDA device through the Hopper kernels, without having one."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import support
from pallas_kernels.hopper import reasons
from sparvar_jax.plans.schedule import ASPECT_TABLES, ScaleSchedule, infinity_schedule
from sparvar_jax.plans.strategy import View
from sparvar_jax.policies import parse_plan

LOGIT_BOUND = 100.0


@pytest.fixture(autouse=True)
def pretend_hopper(monkeypatch):
    if reason := reasons.jax_reason():
        pytest.skip(reason)
    hopper = support.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0))
    monkeypatch.setattr(support, "device_of", lambda *operands: hopper)


@pytest.mark.parametrize(
    ("text", "schedule", "head_dim"),
    [
        ("sparvar-paper", infinity_schedule(1.0), 128),
        ("sparvar-fast + drop_uncond(1)", infinity_schedule(0.75), 64),
        ("adaptive(block=64)", infinity_schedule(1.5), 64),
        ("cs4a(granularity=8, multiple=64, mapping='relative')", infinity_schedule(1.0), 128),
        ("sparvar-fast", ScaleSchedule.of(ASPECT_TABLES[0.75], prefix=300), 64),
    ],
)
def test_plans_lower(text, schedule, head_dim):
    plan = parse_plan(text, schedule, 2, implementation="hopper")
    states = [{} for _ in range(plan.depth)]
    for index, step in enumerate(plan.steps):
        place = dataclasses.replace(plan.place(index), logit_bound=LOGIT_BOUND)
        for segment in step.segments:
            attention = segment.attention
            if attention.name == "dense":
                continue
            rows = 2 if step.rows == "both" else 1
            q = jax.ShapeDtypeStruct((rows, 1, step.scale.tokens, head_dim), jnp.bfloat16)
            k = jax.ShapeDtypeStruct((2, 1, place.rows.total, head_dim), jnp.bfloat16)
            state = states[segment.layers[0]]

            def attend(q, k, v, state, attention=attention, place=place):
                return attention(View(k, v), q, place, state)

            traced = jax.jit(attend).trace(q, k, k, state)
            out, left, _ = traced.out_info
            assert (out.shape, out.dtype) == (q.shape, q.dtype)
            assert set(left) == attention.writes
            if place.index != plan.steps[-2].scale.index:
                assert traced.lower(lowering_platforms=("cuda",))
            state.update({n: jax.ShapeDtypeStruct(x.shape, x.dtype) for n, x in left.items()})
