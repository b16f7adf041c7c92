"""Class-conditional VAR end to end: conversion, sampling, plans, against the twins and numpy."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from sparvar_convert.compare import compare_source
from sparvar_convert.export import export_part
from sparvar_convert.run import convert_source
from sparvar_convert.side_by_side import Options

from sparvar_jax.models import vocabulary
from sparvar_jax.models.var import VarConfig, guidance_ramp
from sparvar_jax.models.vqvae import Vqvae, VqvaeConfig
from sparvar_jax.pipelines import loading
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.runtime import generate
from sparvar_jax.weights import checkpoint
from tests.tiny_var import CONFIG, TOKENIZER, tiny_model, tiny_pipe, twins, write_model

# Float32 logits of order one behind two blocks, in two frameworks; guidance 2 triples an error.
TOLERANCE = 1e-4


@pytest.mark.parametrize("changes", [{}, {"shared_ada": True}, {"l2_norm": False, "heads": 2}])
def test_released_files_convert_and_return_bit_for_bit(tmp_path, changes):
    config = dataclasses.replace(CONFIG, **changes)
    model, pair = write_model(tmp_path, config)
    assert loading.family_in(model).draws == "classes"
    pipe = Pipeline.from_checkpoint(model, dtype="float32")
    assert pipe.model.transformer.config == config
    assert pipe.model.tokenizer.config == TOKENIZER
    for part, twin in zip(("transformer", "tokenizer"), pair, strict=True):
        exported, original = dict(export_part(model, part)), twin.state_dict()
        assert exported.keys() == original.keys()
        for key, value in original.items():
            if key == "quantize.ema_vocab_hit_SV":
                continue  # statistics that are not kept
            assert exported[key].dtype == value.dtype, key
            assert torch.equal(exported[key], value), key


def test_training_checkpoints_convert(tmp_path):
    pair = twins(CONFIG, TOKENIZER)
    trained = {"var_wo_ddp": pair[0].state_dict(), "vae_local": pair[1].state_dict()}
    torch.save({"epoch": 3, "trainer": {"config": {}, **trained}}, tmp_path / "ar-ckpt-last.pth")
    done = convert_source(tmp_path / "ar-ckpt-last.pth", tmp_path / "model")
    assert (done.kind, done.part) == ("var", "transformer")
    assert done.config == dataclasses.replace(CONFIG, dtype=done.config.dtype)


@pytest.mark.parametrize("file", ["var_d2.pth", "vae.pth"])
def test_side_by_side_comparison(tmp_path, file):
    """Released files and their conversions agree; a conversion of other weights does not."""
    model, _ = tiny_model()
    options = Options(guidance=2.0)
    found = compare_source(model.parent / file, model, options)
    assert found.passed, max(found.rows, key=lambda row: row.relative)
    assert len(found.rows) > 20
    twin = twins(CONFIG, TOKENIZER, seed=1)[file == "vae.pth"]
    torch.save(twin.state_dict(), tmp_path / file)
    assert not compare_source(tmp_path / file, model, options).passed


def test_drawn_pictures_agree_with_the_twins():
    """The twins replay what was drawn: same guided logits, same picture."""
    pipe, (twin, tokenizer) = tiny_pipe(), tiny_model()[1]
    request = pipe.request([1, 4], guidance=2.0, seed=3)
    code_sum, outputs = None, []
    steps = pipe.generator.steps(
        request.plan, request.condition, request.controls, request.keys, capture=True
    )
    for state, output in steps:
        outputs.append(output)
        code_sum = state.code_sum
    ids = [torch.tensor(np.asarray(output.tokens)).long() for output in outputs]
    trace, total = twin.replay(torch.tensor([1, 4]), ids, tokenizer.quantize, 2.0)
    for output, step in zip(outputs, trace, strict=True):
        got = np.asarray(output.captured["guided_logits"])
        np.testing.assert_allclose(got, step["guided_logits"], atol=3 * TOLERANCE)
    expected = (tokenizer.decode(total).permute(0, 2, 3, 1).numpy() + 1) * 127.5
    pictures = pipe([1, 4], guidance=2.0, seed=3)
    # Truncation to integers may fall to either side: one step, and rounding below it.
    assert np.abs(pictures - expected).max() <= 1.01
    np.testing.assert_array_equal(pictures, pipe.decode(code_sum))


def test_a_picture_depends_on_its_class_and_seed_alone():
    pipe = tiny_pipe()
    together = pipe([0, 2, 2, 4], seed=[7, 8, 9, 8])
    alone = pipe([2], seed=9)
    assert np.abs(together[2].astype(int) - alone[0]).max() <= 1
    assert np.abs(together[1].astype(int) - together[2]).max() > 10
    shuffled = pipe([4, 2, 0, 2], seed=[8, 9, 7, 8])
    np.testing.assert_array_equal(together[[3, 2, 0, 1]], shuffled)


def test_guidance_grows_from_nothing():
    assert guidance_ramp(4.0, 5) == (1.0, 2.0, 3.0, 4.0, 5.0)


def test_guidance_off_runs_no_unconditional_rows():
    pipe = tiny_pipe()
    off = pipe.request([1], guidance=0.0)
    assert {step.rows for step in off.plan.steps} == {"cond"}
    on = pipe.request([1], guidance=1.0)
    assert [step.merge_at for step in on.plan.steps] == [None, 2, 2, 2]
    dense = dense_plan(CONFIG.schedule, CONFIG.depth)
    same = pipe([1, 3], plan=dense, guidance=0.0, seed=5)
    np.testing.assert_array_equal(same, pipe([1, 3], guidance=0.0, seed=5))


@pytest.mark.parametrize(
    "plan",
    [
        "sparvar(0,sinks=1,form='boxes')+skip_last_scales(1)",
        "adaptive(sinks=1)+drop_uncond(1)",
    ],
)
def test_policies_run_unchanged(plan):
    pipe = tiny_pipe()
    request = pipe.request([1, 2], plan=plan)
    assert 0 < request.plan.density() < 1
    pictures = pipe([1, 2], plan=plan)
    assert pictures.shape == (2, 24, 24, 3)
    assert pictures.std() > 1


def test_sparse_plans_that_keep_everything_draw_the_dense_picture():
    pipe = tiny_pipe()
    wide = pipe([1, 2], plan="csla(sinks=4)", seed=1)
    assert np.abs(wide.astype(int) - pipe([1, 2], seed=1)).max() <= 1


def test_presets_have_the_released_sizes():
    d16, d36 = VarConfig.preset("var_d16"), VarConfig.preset("var_d36")
    assert (d16.width, d16.heads, d16.head_dim, d16.mlp_width) == (1024, 16, 64, 4096)
    assert (d16.tokens, d36.tokens) == (680, 2240)
    assert (d16.shared_ada, d36.shared_ada, d36.schedule.final) == (False, True, (32, 32))
    with pytest.raises(ValueError, match="unknown preset"):
        VarConfig.preset("var_d17")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": [5]}, "classes must lie"),
        ({"labels": []}, "at least one class"),
        ({"labels": [1], "seed": [1, 2]}, "2 seeds for 1"),
        ({"labels": [1], "seed": -1}, "seed must lie"),
        ({"labels": [1], "seed": [-1]}, "seeds must lie"),
        ({"labels": [1], "guidance": (1.0, 2.0)}, "guidance needs"),
        ({"labels": [1], "top_p": 2.0}, "top_p"),
        ({"labels": [1], "plan": "nonsense"}, "unknown policy"),
    ],
)
def test_impossible_requests_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipe().request(**options)


def test_sides_must_grow():
    with pytest.raises(ValueError, match="sides must grow"):
        VarConfig(1, 64, 1, sides=(1, 3, 3))


def removed_by_sorting(logits, top_k, top_p):
    """The released filter, in float64 with a sort: the truth for `vocabulary.removed`."""
    logits = logits.astype(np.float64)
    if top_k:
        least = np.sort(logits, axis=-1)[..., -min(top_k, logits.shape[-1])]
        logits = np.where(logits < least[..., None], -np.inf, logits)
    order = np.argsort(logits, axis=-1, kind="stable")
    ascending = np.take_along_axis(logits, order, -1)
    mass = np.exp(ascending - ascending[..., -1:])
    mass = np.cumsum(mass / mass.sum(-1, keepdims=True), -1)
    drop = mass <= 1 - top_p if top_p else np.zeros_like(mass, bool)
    drop[..., -1] = False
    unsorted = np.zeros_like(drop)
    np.put_along_axis(unsorted, order, drop, -1)
    return unsorted | np.isinf(logits)


@pytest.mark.parametrize("top_k", [0, 1, 7, 100, 5000])
@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.96, 1.0])
def test_filters_equal_sorting(top_k, top_p):
    logits = 4 * np.random.default_rng(top_k).normal(size=(3, 50, 100)).astype(np.float32)
    got = vocabulary.removed(jnp.asarray(logits), jnp.asarray(top_k), jnp.float32(top_p))
    np.testing.assert_array_equal(got, removed_by_sorting(logits, top_k, top_p))


def test_filters_on_ties_signs_and_extremes():
    logits = jnp.array([[0.0, -0.0, 1.0, 1.0], [-1e38, 3e38, -jnp.inf, 0.0], [2.0, 2.0, 2.0, 2.0]])
    got = vocabulary.removed(logits, jnp.asarray(1), jnp.float32(1.0))
    np.testing.assert_array_equal(got, [[1, 1, 0, 0], [1, 0, 1, 1], [0, 0, 0, 0]])
    got = vocabulary.removed(logits, jnp.asarray(3), jnp.float32(1.0))
    np.testing.assert_array_equal(got[0], [0, 0, 0, 0])


def test_sampling_follows_the_filtered_distribution():
    logits = jnp.array([0.0, 1.0, 2.0, -3.0, 2.5])
    keys = jax.random.split(jax.random.key(0), 20)
    ids = vocabulary.sample(
        jnp.broadcast_to(logits, (20, 1000, 5)), jnp.asarray(3), jnp.float32(1.0), keys
    )
    share = np.bincount(np.asarray(ids).reshape(-1), minlength=5) / ids.size
    kept = np.exp([-np.inf, 1.0, 2.0, -np.inf, 2.5])
    # 20,000 draws: a standard deviation of a share is at most 0.0036.
    np.testing.assert_allclose(share, kept / kept.sum(), atol=0.015)


def test_mixtures_sharpen_into_samples():
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(2, 30, 40)), jnp.float32)
    keys = jax.random.split(jax.random.key(1), 2)
    arguments = (logits, jnp.asarray(10), jnp.float32(0.9), keys)
    early, late = vocabulary.mixture(*arguments, 0.0), vocabulary.mixture(*arguments, 1.0)
    for weights in (early, late):
        np.testing.assert_allclose(weights.sum(-1), 1, atol=1e-5)
        filtered = vocabulary.removed(logits, jnp.asarray(10), jnp.float32(0.9))
        assert not np.asarray(weights)[np.asarray(filtered)].any()
    assert late.max(-1).mean() > 0.98 > early.max(-1).mean()


def test_bfloat16_decodes_near_float32_and_encodes_exactly():
    full, half = tiny_pipe(), Pipeline.from_checkpoint(tiny_model()[0], dtype="bfloat16")
    shapes = checkpoint.abstract_parameters(half.model.tokenizer)
    islands = {path for path, leaf in shapes.items() if leaf.dtype == "float32"}
    kept = ("encoder.", "quant_conv.", "codebook.", "decoder.conv_out.")
    assert islands == {p for p in shapes if p.startswith(kept) or "norm" in p}
    draw = np.random.default_rng(0)
    pictures = draw.integers(0, 256, (1, 24, 24, 3), np.uint8)
    ours, theirs = half.tokenise(pictures), full.tokenise(pictures)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    error = half.decode(ours.code_sum).astype(int) - full.decode(theirs.code_sum)
    # 24 layers round kernel and output to 8 bits: each moves values near one by up to 2^-9, at
    # random, in units of half of 255.
    assert np.sqrt(np.mean(error**2.0)) < 127.5 * 48**0.5 * 2**-9
    assert error.any()


def test_the_dtype_suits_the_device(monkeypatch):
    assert loading.compute_dtype(None) == "float32"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert loading.compute_dtype(None) == "bfloat16"
    assert loading.compute_dtype("float32") == "float32"


def test_smooth_pictures_are_drawn_from_mixtures():
    pipe = tiny_pipe()
    smooth = pipe([1, 2], smooth=True, seed=4)
    assert smooth.shape == (2, 24, 24, 3)
    assert np.abs(smooth.astype(int) - pipe([1, 2], seed=4)).max() > 1


def test_parts_that_do_not_fit_are_refused():
    pipe = tiny_pipe()
    other = functools.partial(dataclasses.replace, pipe.model)
    tokenizer = VqvaeConfig(64, 8, base_width=32, multipliers=(1, 2), blocks=1)
    stranger = nnx.eval_shape(lambda: Vqvae(tokenizer, rngs=nnx.Rngs(0)))
    with pytest.raises(ValueError, match="48 codes of width 8"):
        other(tokenizer=stranger)


def test_controls_filter_in_the_loop():
    """With one candidate left, sampling is greedy."""
    pipe = tiny_pipe()
    request = pipe.request([3], top_k=1, guidance=1.0)
    arguments = (request.plan, request.condition, request.controls, request.keys)
    _, drawn = pipe.generator.run(*arguments)
    _, greedy = pipe.generator.run(*arguments, how="greedy")
    for one, two in zip(drawn, greedy, strict=True):
        np.testing.assert_array_equal(one.tokens, two.tokens)
    assert isinstance(request.controls, type(generate.controls(4)))


@pytest.mark.slow
def test_d16_in_the_released_container(tmp_path):
    """The released shapes: converts, draws and returns every bit."""
    config = VarConfig.preset("var_d16", dtype="float32")
    model, pair = write_model(tmp_path, config, VqvaeConfig())
    pipe = Pipeline.from_checkpoint(model, dtype="float32")
    assert pipe.model.transformer.config == config
    assert pipe([207]).shape == (1, 256, 256, 3)
    for part, twin in zip(("transformer", "tokenizer"), pair, strict=True):
        original = twin.state_dict()
        for key, value in export_part(model, part):
            assert torch.equal(value, original.pop(key)) or "ema_vocab" in key
        assert not original


def test_classes_and_seeds_are_whole_numbers_of_any_library():
    pipe = tiny_pipe()
    usual = pipe([2], seed=3)
    np.testing.assert_array_equal(pipe(np.int64(2), seed=np.int32(3)), usual)
    np.testing.assert_array_equal(pipe(np.array([2]), seed=np.array([3])), usual)


@pytest.mark.unchecked
@pytest.mark.parametrize("wrong", [{"labels": 2.7}, {"labels": 2, "seed": 0.5}])
def test_fractional_classes_and_seeds_are_refused(wrong):
    with pytest.raises(ValueError, match="whole numbers"):
        tiny_pipe()(**wrong)
