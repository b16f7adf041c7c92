"""The generation loop: independence of neighbours, forced bits, guidance cases, reproducibility."""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.models import sampling
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.policies import skip_last_scales
from sparvar_jax.runtime import generate, steps
from sparvar_jax.runtime.state import empty_state

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (3, 4), (6, 8)))
CONFIG = InfinityConfig(2, 64, 2, text_width=128, bits=8, dtype="float32")
# Batches of different sizes sum in another order; logits are of order 1 in float32.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def generator():
    return generate.Generator(Infinity(CONFIG, rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def text():
    return jax.random.normal(jax.random.key(1), (2, 5, 128)), jnp.array([3, 5])


@functools.partial(jax.jit, static_argnames="guidance")
def embedded(model, features, lengths, guidance):
    return model.embed_condition(features, lengths, guidance)


def embed(generator, text, guidance):
    return embedded(generator.model, *text, guidance)


def draw(generator, text, keys, guidance="learned", plan=None, **options):
    plan = plan or dense_plan(SCHEDULE, 2)
    condition = embed(generator, text, guidance)
    controls = generate.controls(len(SCHEDULE), guidance=2.0, temperature=1.0)
    return generator.run(plan, condition, controls, keys, **options)


def bits(drawn):
    """All bits of every image: the code sums of another batch size may differ in rounding."""
    return np.concatenate([output.tokens for output in drawn[1]], axis=1)


def test_a_picture_depends_on_its_own_prompt_and_key_only(generator, text):
    keys = sampling.image_keys(7, 2)
    features, lengths = text
    together = bits(draw(generator, text, keys))
    alone = bits(draw(generator, (features[1:], lengths[1:]), keys[1:]))
    swapped = bits(draw(generator, (features[::-1], lengths[::-1]), keys[::-1]))
    assert np.array_equal(together[1], alone[0])
    assert np.array_equal(together, swapped[::-1])
    assert not np.array_equal(together[0], together[1])


def test_padding_behind_a_prompt_changes_nothing(generator, text):
    features, lengths = text
    poisoned = features.at[0, 3:].set(1e6)
    keys = sampling.image_keys(0, 2)
    ours, _ = draw(generator, (features, lengths), keys)
    theirs, _ = draw(generator, (poisoned, lengths), keys)
    assert np.array_equal(ours, theirs)


def test_forcing_the_drawn_bits_reproduces_the_picture(generator, text):
    keys = sampling.image_keys(3, 2)
    drawn, outputs = draw(generator, text, keys)
    tokens = tuple(output.tokens for output in outputs)
    forced, _ = draw(generator, text, sampling.image_keys(99, 2), forced=tokens)
    assert np.array_equal(drawn, forced)


def test_same_key_same_bits_other_key_other_bits(generator, text):
    first, _ = draw(generator, text, sampling.image_keys(1, 2))
    again, _ = draw(generator, text, sampling.image_keys(1, 2))
    other, _ = draw(generator, text, sampling.image_keys(2, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_plans_compiled_at_once_share_their_common_steps(generator, text):
    condition = embed(generator, text, "learned")
    whole = dense_plan(SCHEDULE, 2)
    short = skip_last_scales(1)(whole)
    fresh = generate.Generator(generator.model)
    with ThreadPoolExecutor() as pool:
        one, other = pool.map(lambda plan: fresh.compile(plan, condition, 2), (whole, short))
    assert (len(one), len(other)) == (4, 3)
    assert [a is b for a, b in zip(one, other, strict=False)] == [True, True, False]


def test_guidance_one_equals_guidance_off(generator, text):
    """With g = 1 the mix is the conditional half, so both rows or one must draw the same logits."""
    condition, alone = embed(generator, text, "learned"), embed(generator, text, None)
    keys = sampling.image_keys(0, 2)
    controls = generate.controls(len(SCHEDULE), guidance=1.0, temperature=1.0)
    both = list(generator.steps(dense_plan(SCHEDULE, 2), condition, controls, keys, capture=True))
    tokens = tuple(output.tokens for _, output in both)
    off = generator.steps(
        dense_plan(SCHEDULE, 2, guidance=False), alone, controls, keys, forced=tokens, capture=True
    )
    for (_, ours), (_, theirs) in zip(both, off, strict=True):
        np.testing.assert_allclose(
            ours.captured["guided_logits"], theirs.captured["guided_logits"], atol=TOLERANCE
        )


def test_layouts_draw_the_same(generator, text):
    keys = sampling.image_keys(0, 2)
    packed, outputs = draw(generator, text, keys)
    plan = dense_plan(SCHEDULE, 2, layout="aligned")
    tokens = tuple(output.tokens for output in outputs)
    aligned, _ = draw(generator, text, keys, plan=plan, forced=tokens)
    assert np.array_equal(packed, aligned)


@pytest.mark.parametrize("layout_name", ["packed", "aligned"])
def test_every_scale_clears_the_rows_that_kernels_may_read(generator, text, layout_name):
    """Of an earlier picture that was not finite, nothing is left in blocks of 128 rows in use."""
    plan = dense_plan(SCHEDULE, 2, layout=layout_name)
    layout = SCHEDULE.layout(layout_name)
    start = generator.start(plan, batch=2)
    poisoned = jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), (start.cache, start.shared))
    state = empty_state(generator.model, plan, 2, poisoned)
    condition = embed(generator, text, "learned")
    controls = generate.controls(len(SCHEDULE))
    for index in range(len(SCHEDULE)):
        keys = sampling.image_keys(0, 2)
        state, _ = generator.decode_scale(plan, index, condition, state, controls, keys)
        used = -(-layout.filled(index) // 128) * 128
        hidden = np.ones(used, bool)
        hidden[layout.physical(index)] = False
        for buffer in jax.tree.leaves(state.cache):
            assert np.isfinite(buffer[:, :, :used]).all()
            assert not np.asarray(buffer[:, :, :used])[:, :, hidden].any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": (1.0, 2.0)}, "guidance needs one value or 4"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_p": 0.0}, "top_p must lie in"),
        ({"guidance": float("nan")}, "guidance must be finite"),
    ],
)
def test_bad_controls(options, message):
    with pytest.raises(ValueError, match=message):
        generate.controls(4, **options)


def test_nucleus_removes_the_unlikely_label():
    # softmax of (0, x) is at most 0.03 for the first label from x = ln(0.97 / 0.03) = 3.476 on.
    pairs = jnp.array([[0.0, 3.4], [0.0, 3.5], [4.0, 0.0], [0.0, 0.0]])
    removed = sampling.bits_removed(pairs, jnp.float32(0.97))
    assert removed.tolist() == [[False, False], [True, False], [False, True], [False, False]]


def test_bits_follow_their_probability():
    """Frequencies of 40,000 draws lie within four standard errors of the filtered probability."""
    logits = jnp.array([0.0, 1.0, -2.0, 5.0, -5.0])
    pairs = jnp.broadcast_to(jnp.stack([jnp.zeros(5), logits], -1), (1, 40000, 5, 2))
    bits = sampling.sample_bits(pairs, jnp.float32(0.97), sampling.image_keys(0, 1))
    expected = np.array([0.5, 0.7311, 0.1192, 1.0, 0.0])
    error = 4 * np.sqrt(expected * (1 - expected) / 40000) + 1e-4
    assert (np.abs(np.asarray(bits).mean((0, 1)) - expected) <= error).all()


def test_one_set_of_spare_buffers_is_kept_and_can_be_released(generator, text):
    generator.release()
    dense = dense_plan(SCHEDULE, 2)
    for plan in (dense, dataclasses.replace(dense, layout="aligned"), skip_last_scales(1)(dense)):
        draw(generator, text, sampling.image_keys(0, 2), plan=plan)
        assert len(generator._pool._spare) == 1
    generator.release()
    assert not generator._pool._spare


def test_a_failed_compile_is_tried_again(text, monkeypatch):
    fresh = generate.Generator(Infinity(CONFIG, rngs=nnx.Rngs(0)))
    condition, plan = embed(fresh, text, "learned"), dense_plan(SCHEDULE, 2)
    controls = generate.controls(len(SCHEDULE))
    usual = steps.compile_traced

    def failing(traced, file):
        raise RuntimeError("no memory left")

    monkeypatch.setattr(steps, "compile_traced", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        fresh.compile(plan, condition, 2)
    monkeypatch.setattr(steps, "compile_traced", usual)
    state = fresh.start(plan, 2)
    _, output = fresh.decode_scale(plan, 0, condition, state, controls, sampling.image_keys(0, 2))
    assert output.tokens.shape == (2, 1, 8)


def test_forced_tokens_of_any_dtype(generator, text):
    condition, plan = embed(generator, text, "learned"), dense_plan(SCHEDULE, 2)
    controls, keys = generate.controls(len(SCHEDULE)), sampling.image_keys(0, 2)
    codes = []
    for dtype in (jnp.int8, jnp.int32):
        forced = jnp.ones((2, 1, 8), dtype)
        state, _ = generator.decode_scale(
            plan, 0, condition, generator.start(plan, 2), controls, keys, forced=forced
        )
        codes.append(np.asarray(state.code_sum))
    np.testing.assert_array_equal(*codes)


def test_more_scales_than_the_model_has_levels_are_refused(text):
    few = generate.Generator(Infinity(dataclasses.replace(CONFIG, levels=2), rngs=nnx.Rngs(0)))
    condition, plan = embed(few, text, "learned"), dense_plan(SCHEDULE, 2)
    with pytest.raises(ValueError, match=r"scale 2.* 2 levels"):
        few.compile(plan, condition, 2)


def test_controls_take_numbers_of_any_library():
    plain = generate.controls(2, guidance=2.0, temperature=(1.0, 0.5))
    for two in (np.float32(2), np.array(2.0), jnp.float32(2)):
        other = generate.controls(2, guidance=two, temperature=np.array([1.0, 0.5]))
        assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), plain, other))


def test_draws_depend_on_no_setting_of_the_process():
    pairs = jax.random.normal(jax.random.key(0), (2, 9, 8, 2), jnp.float32)
    usual = sampling.sample_bits(pairs, jnp.float32(1), sampling.image_keys(5, 2))
    with jax.enable_x64(True):
        wide = sampling.sample_bits(pairs, jnp.float32(1), sampling.image_keys(np.int64(5), 2))
    with jax.default_prng_impl("rbg"):
        other = sampling.sample_bits(pairs, jnp.float32(1), sampling.image_keys(5, 2))
    np.testing.assert_array_equal(usual, wide)
    np.testing.assert_array_equal(usual, other)
