"""Products of activations as they are with 8-bit weights: XLA's, interpreted, lowered, on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import support
from pallas_kernels.portable import reasons

HOPPER = support.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
AMPERE = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
INT8, E4M3 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
needs_triton = pytest.mark.skipif(bool(reasons.jax_reason()), reason=reasons.jax_reason() or "-")


def operands(dtype, weights, batch=2, tokens=9, inputs=200, outputs=72):
    """Values of all sizes: normal activations, and weights rounded to 8 bits."""
    keys = jax.random.split(jax.random.key(inputs + outputs))
    x = jax.random.normal(keys[0], (batch, tokens, inputs), jnp.float32).astype(dtype)
    kernel = jax.random.normal(keys[1], (1, outputs, inputs), jnp.float32)
    eight = pk.quantise(kernel, weights)
    return x, eight.values[0], eight.scale[0, 0]


def truth(x, weight, scale):
    """float64, and the same of magnitudes: what roundings of sums are relative to."""
    x, weight = (np.asarray(value.astype(jnp.float32), np.float64) for value in (x, weight))
    weight = weight * np.asarray(scale, np.float64)[:, None]
    return x @ weight.T, np.abs(x) @ np.abs(weight).T


def check(out, given):
    """Sums of n float32 products are off by n half steps at most; then a result is rounded once."""
    expected, sizes = truth(*given)
    step = {jnp.dtype(jnp.float32): 2.0**-24}.get(given[0].dtype, 2.0**-8)
    inputs = given[0].shape[-1]
    bound = inputs * 2.0**-24 * sizes + step * np.abs(expected) + 1e-30
    assert out.dtype == given[0].dtype
    assert (np.abs(np.asarray(out, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("weights", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_compilers_products_against_float64(dtype, weights):
    given = operands(dtype, weights)
    check(pk.weight_matmul(*given, implementation="xla"), given)


@needs_triton
@pytest.mark.parametrize("weights", [INT8, E4M3], ids=str)
@pytest.mark.parametrize(
    ("batch", "tokens", "inputs", "outputs"),
    [(2, 1, 64, 32), (1, 37, 200, 72), (2, 100, 520, 40)],
    ids=["one token", "tails everywhere", "two tiles of rows"],
)
def test_the_kernel_against_float64(batch, tokens, inputs, outputs, weights, on, monkeypatch):
    from pallas_kernels.portable import _triton as tri

    call = tri.call
    monkeypatch.setattr(tri, "call", lambda *a, **n: call(*a, **n | {"interpret": True}))
    on(HOPPER)
    given = operands(jnp.bfloat16, weights, batch, tokens, inputs, outputs)
    check(pk.weight_matmul(*given, implementation="portable"), given)


@needs_triton
@pytest.mark.parametrize(
    ("device", "dtype", "weights", "tokens", "reason"),
    [
        (HOPPER, jnp.bfloat16, INT8, 144, ""),
        (HOPPER, jnp.bfloat16, E4M3, 144, ""),
        (AMPERE, jnp.bfloat16, INT8, 144, ""),
        (AMPERE, jnp.bfloat16, E4M3, 144, "capability 8.9"),
        (HOPPER, jnp.float32, INT8, 144, "16-bit activations"),
        (HOPPER, jnp.bfloat16, INT8, 2000, "left to the compiler"),
    ],
)
def test_who_serves(device, dtype, weights, tokens, reason, on):
    on(device)
    x, weight, scale = (
        jax.ShapeDtypeStruct(shape, kind)
        for shape, kind in (((2, tokens, 3584), dtype), ((512, 3584), weights),
                            ((512,), jnp.float32))
    )  # fmt: skip
    traced = jax.jit(lambda *a: pk.weight_matmul(*a)).trace(x, weight, scale)
    assert ("pallas_call" in str(traced.jaxpr)) == (not reason)
    if "compiler" not in reason and reason:
        with pytest.raises(NotImplementedError, match=reason):
            jax.eval_shape(lambda *a: pk.weight_matmul(*a, implementation="portable"), x, weight,
                           scale)  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 144, 255])
def test_the_kernel_on_a_gpu(tokens, weights):
    given = operands(jnp.bfloat16, weights, 2, tokens, 3584, 10752)
    check(jax.jit(pk.weight_matmul)(*given), given)


def test_other_weights_are_refused():
    x, weight, scale = operands(jnp.float32, INT8)
    with pytest.raises(ValueError, match="8-bit values are int8 or float8_e4m3fn; got int32"):
        pk.weight_matmul(x, weight.astype(jnp.int32), scale)
