"""Memory estimates against the arrays a generation really allocates, and what XLA laid out."""

import json

import jax
import jax.numpy as jnp
import pytest

from benchmarks import planned_memory
from benchmarks._record import RESULTS
from sparvar_jax.models.infinity_parts import InfinityConfig
from sparvar_jax.models.var_parts import VarConfig
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.memory import estimate, step_bytes, view_bytes
from sparvar_jax.pipelines.requests import resolve_plan, resolve_schedule
from sparvar_jax.plans.caches import CACHES, with_cache
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.policies.per_head import per_head
from sparvar_jax.policies.scalekv import scalekv
from sparvar_jax.runtime.generate import Generator
from tests import tiny_hart
from tests.tiny_model import write_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("memory") / "model")


def bytes_of(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize(("guidance", "batch"), [(3.0, 2), (1.0, 1)])
def test_weights_and_cache_are_exact(folder, guidance, batch):
    described = loading.describe_model(folder, "float32")
    plan = resolve_plan(described, "dense", resolve_schedule(described, "2:3"), guidance)
    needed = estimate(described, plan, batch)
    model = loading.load_model(folder, dtype="float32")
    generator = Generator(model.transformer)
    state = jax.eval_shape(lambda: generator.start(plan, batch))
    assert needed.cache == bytes_of(state.cache)
    assert needed.weights["transformer"] == bytes_of(model.transformer)
    assert needed.weights["text"] == bytes_of(model.text_encoder)
    assert needed.peak >= sum(needed.weights.values()) + needed.cache + needed.decode


def test_devices_divide_cache_and_steps_but_not_weights(folder):
    described = loading.describe_model(folder, "float32")
    plan = resolve_plan(described, "dense", resolve_schedule(described))
    whole, half = (estimate(described, plan, 2, parts) for parts in ((1, 1), (1, 2)))
    assert (half.cache * 2, half.step * 2) == (whole.cache, whole.step)
    assert half.weights == whole.weights
    assert estimate(described, plan, 2, (2, 1)) == estimate(described, plan, 1)


def test_bfloat16_halves_the_cache_and_dropped_rows_the_step(folder):
    single, half = (loading.describe_model(folder, name) for name in ("float32", "bfloat16"))
    schedule = resolve_schedule(single)
    plan = resolve_plan(single, "dense", schedule)
    assert estimate(half, plan, 1).cache * 2 == estimate(single, plan, 1).cache
    dropped = resolve_plan(single, "dense+drop_uncond(1)", schedule)
    assert estimate(single, dropped, 1).step < estimate(single, plan, 1).step


def test_8_bit_matrices_and_lean_caches_are_told_before_anything_is_loaded(folder):
    described = loading.describe_model(folder, "float32", "int8")
    plan = with_cache(resolve_plan(described, "dense", resolve_schedule(described)), "lean")
    needed, loaded = estimate(described, plan, 2), loading.load_model(folder, weights="int8")
    state = jax.eval_shape(lambda: Generator(loaded.transformer).start(plan, 2))
    assert needed.weights["transformer"] == bytes_of(loaded.transformer)
    assert needed.weights["transformer"] < bytes_of(loading.load_model(folder).transformer)
    assert needed.cache == bytes_of((state.cache, state.shared))


def test_a_batch_shares_the_widest_maps_of_one_picture():
    """d36, of which four pictures fill a device: hidden maps and logits of 64 are those of four.

    What grows is told per token: the float32 stream, and in 16 bits queries, keys and values with
    the queries that meet their places.
    """
    config = VarConfig.preset("var_d36")
    width, tokens = config.width, config.sides[-1] ** 2
    one, four, many = (step_bytes(config, 2 * batch, tokens) for batch in (1, 4, 64))
    feeding, drawing = 2 * (3 * width + config.mlp_width), 2 * 4 * config.vocab
    assert one == 2 * tokens * (4 * width + max(feeding, drawing))
    assert four == 4 * one
    assert many == 2 * 64 * tokens * (4 + 2 * 4) * width
    # Two rows of a large picture are never divided.
    large = InfinityConfig.preset("infinity_8b")
    assert step_bytes(large, 2, 9216) == 2 * 9216 * (10 * large.width + 2 * large.mlp_width)
    assert step_bytes(large, 16, 4096) == 16 * 4096 * 12 * large.width


def test_what_is_put_together_for_attention_is_told():
    """1024x1024, 40 layers: whoever keeps a budget lays a layer's rows out anew to read them.

    Before the last scale drafters of ScaleKV hold 6,200 rows, and 4,096 are new; HeatKV's heads all
    lie in a layer of 10,624. The other caches are read where they lie, or in a scratch.
    """
    schedule, shape = infinity_schedule(1.0, "1M"), CacheShape(2, 28, 128, jnp.dtype("bfloat16"))
    row = 2 * 2 * 28 * 128 * 2  # keys and values, conditional or not, in 16 bits
    dense = dense_plan(schedule, 40)
    assert [view_bytes(with_cache(dense, cache), shape) for cache in CACHES] == [0, 0, 0]
    published, orders = scalekv("8b")(dense), per_head("infinity_8b", 0.1)(dense)
    assert view_bytes(published, shape) == (6200 + 4096) * row
    assert view_bytes(orders, shape) == 10624 * row


def test_a_model_with_its_text_in_the_cache():
    pipe = tiny_hart.tiny_pipe()
    request = pipe.request(["a red apple"] * 2)
    needed = estimate(loading.describe_model(tiny_hart.tiny_model(), "float32"), request.plan, 2)
    state = jax.eval_shape(lambda: pipe.generator.start(request.plan, 2))
    assert needed.cache == bytes_of(state.cache)
    assert needed.condition == bytes_of(request.condition)
    assert needed.weights["transformer"] == bytes_of(pipe.model.transformer)


def test_estimates_of_large_models_are_what_xla_lays_out_for_an_h100():
    """XLA's account is in `planned.json`; of two models estimates are made here as well."""
    rows = json.loads((RESULTS / "planned.json").read_text())["rows"]
    cases = [planned_memory.case_of(row) for row in rows]
    assert cases == list(planned_memory.CASES)
    told = [row["estimated_gib"] for row in rows]
    for model, cache in (("infinity_8b", "int8"), ("infinity_2b", "lean")):
        index = max(n for n, c in enumerate(cases) if (c.model, c.cache) == (model, cache))
        told[index] = planned_memory.planned(cases[index])[2].peak_text_freed / 2**30
    for case, row, estimated in zip(cases, rows, told, strict=True):
        off = estimated / row["planned_gib"]["peak"] - 1
        assert abs(off) <= planned_memory.OFF, f"{case.name}: {off:+.1%}"
