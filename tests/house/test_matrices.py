"""8-bit weights: the same pictures where arithmetic is exact, a quarter of the bytes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sparvar_jax.models import layers
from sparvar_jax.pipelines.memory import parameter_bytes
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.runtime.generate import Generator
from sparvar_jax.weights import checkpoint
from sparvar_jax.weights.matrix import FEWEST_TOKENS, Dense, Scaled, dense_of, product
from tests import demo_case
from tests.house.support import SCHEDULE, draw, model

HIGHEST = jax.lax.Precision.HIGHEST


def scaled(kernel):
    """8-bit values, and a power of two for each output: multiplying by it rounds nothing."""
    peak = np.abs(kernel).max(0)
    scale = np.exp2(np.ceil(np.log2(peak / 127)))
    return np.round(kernel / scale).astype(np.int8), scale


def two_forms(transformer):
    """The model with 8-bit matrices, and one with the dense matrices that they stand for."""
    eight, dense = (jax.tree.map(lambda x: x, transformer) for _ in range(2))
    for (_, one), (_, other) in zip(nnx.iter_modules(eight), nnx.iter_modules(dense), strict=True):
        if isinstance(one, layers.Linear):
            values, scale = scaled(np.asarray(one.kernel[...]))
            one.kernel = nnx.Param(jnp.asarray(values))
            one.kernel_scale = nnx.data(nnx.Param(jnp.asarray(scale)))
            other.kernel = nnx.Param(jnp.asarray(values * scale))
    return eight, dense


def test_8_bit_matrices_draw_the_bits_of_the_dense_ones():
    """A sum of products times a power of two is the sum of products that are so many times larger:
    every rounding in between is the same.
    """
    eight, dense = two_forms(model())
    plan = dense_plan(SCHEDULE, 2)
    generator = Generator(model())
    ours, plain = (draw(one, plan, capture=True) for one in (Generator(eight), generator))
    generator.model = dense  # of the same structure: the same programs
    theirs = draw(generator, plan, capture=True)
    np.testing.assert_array_equal(ours[0], theirs[0])
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_array_equal(one.tokens, other.tokens)
    logits = [drawn[1][0].captured["raw_logits"] for drawn in (ours, theirs, plain)]
    np.testing.assert_array_equal(logits[0], logits[1])
    assert np.abs(logits[0] - logits[2]).max() > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_products_against_float64(dtype):
    """A float32 sum of I products is off by at most I + 2 roundings of the sum of magnitudes
    (Higham, section 3.1); operands and result are rounded to `dtype` once each.
    """
    draws = np.random.default_rng(0)
    x, kernel = draws.normal(size=(3, 5, 64)), draws.normal(size=(64, 48))
    peak = np.abs(kernel).max(0)
    values, scale = np.round(kernel / peak * 127).astype(np.int8), (peak / 127).astype(np.float32)
    exact = x @ (values.astype(np.float64) * scale)
    weight = Scaled(jnp.asarray(values), jnp.asarray(scale))
    got = product(jnp.asarray(x, jnp.float32), weight, dtype=dtype, precision=HIGHEST)
    assert got.dtype == dtype
    magnitudes = np.abs(x) @ (np.abs(values.astype(np.float64)) * scale)
    summing, rounding = 66 * 2.0**-24, 2 * 2.0 ** (-24 if dtype == "float32" else -8)
    error = np.abs(np.asarray(got, np.float64) - exact)
    assert (error <= (summing + rounding) * magnitudes).all()
    dense = dense_of(weight, jnp.float32)
    plain = product(jnp.asarray(x, jnp.float32), Dense(dense), dtype="float32", precision=HIGHEST)
    error = np.abs(np.asarray(plain, np.float64) - exact)
    assert (error <= (summing + 4 * 2.0**-24) * magnitudes).all()


def test_the_demo_model_in_its_stored_8_bits():
    """Its matrices are stored in 8 bits, so that nothing is lost by leaving them there.

    Sums are scaled after instead of before, each off by a rounding of float32; logits of order ten
    then differ by some 1e-4 after six layers.
    """
    dense = Pipeline.from_checkpoint(None, dtype="float32")
    stored = Pipeline.from_checkpoint(None, dtype="float32", weights="stored")
    sizes = [
        parameter_bytes(checkpoint.abstract_parameters(pipe.model.transformer))
        for pipe in (dense, stored)
    ]
    assert sizes[1] < 0.35 * sizes[0]
    call = {"size": "0.06M", "plan": "skip_last_scales(5)", "seed": 3}
    request = dense.request(["a red apple"], **call)
    arguments = request.plan, request.condition, request.controls, request.keys
    _, plain = dense.generator.run(*arguments, capture=True)
    tokens = tuple(output.tokens for output in plain)
    other = stored.request(["a red apple"], **call)
    arguments = other.plan, other.condition, other.controls, other.keys
    _, ours = stored.generator.run(*arguments, capture=True, forced=tokens)
    for one, two in zip(ours, plain, strict=True):
        error = np.abs(one.captured["raw_logits"] - two.captured["raw_logits"]).max()
        assert 0 < error < 1e-3


def test_the_demo_model_with_eight_bit_products():
    """Weights are exact, for they are stored so; activations of its last scale are rounded.

    Scales of fewer tokens multiply as ever, so that they differ by roundings of float32 alone. The
    truth are the stored logits of the dense float32 model, whose bits are fed back.
    """
    narrow = Pipeline.from_checkpoint(None, dtype="float32", weights="int8")
    kernel = narrow.model.transformer.blocks[0].attn.qkv.kernel[...]
    assert kernel.dtype == jnp.int8
    assert narrow.model.transformer.blocks[0].ffn.fc2.kernel[...].dtype == jnp.float8_e4m3fn
    with np.load(demo_case.STORED) as file:
        drawn, expected = (
            [file[f"{name}.{index}"] for index in range(len(file.files) // 2)]
            for name in ("tokens", "logits")
        )
    errors = [
        np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
        for ours, theirs in zip(demo_case.loop_logits(narrow, drawn), expected, strict=True)
    ]
    tokens = [bits.shape[1] for bits in drawn]
    assert tokens[-1] >= FEWEST_TOKENS > tokens[-2]
    # fc2's weights were int8 and are e4m3 now: half of 2^-3 at most, a root mean square of 0.026.
    assert max(errors[:-1]) < 0.03
    assert errors[-1] < 0.06


@pytest.mark.unchecked
def test_unknown_forms_are_refused():
    with pytest.raises(ValueError, match="'dense', 'stored' or 'int8'"):
        Pipeline.from_checkpoint(None, weights="float4")
