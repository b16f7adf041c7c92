"""Products of activations as they are with 8-bit weights: XLA's, interpreted, lowered, on a GPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import backends, support
from pallas_kernels.hopper import reasons as hopper_reasons
from pallas_kernels.hopper.product_tiles import Tile, parts_of
from pallas_kernels.portable import reasons

HOPPER = support.Device("gpu", "NVIDIA H100 80GB HBM3", (9, 0), 132)
AMPERE = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
INT8, E4M3 = jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn)
needs_mosaic = pytest.mark.skipif(
    bool(hopper_reasons.jax_reason()), reason=hopper_reasons.jax_reason() or "-"
)
needs_triton = pytest.mark.skipif(bool(reasons.jax_reason()), reason=reasons.jax_reason() or "-")


def operands(dtype, weights, batch=2, tokens=9, inputs=200, outputs=72):
    """Values of all sizes: normal activations, and weights rounded to 8 bits."""
    keys = jax.random.split(jax.random.key(inputs + outputs))
    x = jax.random.normal(keys[0], (batch, tokens, inputs), jnp.float32).astype(dtype)
    kernel = jax.random.normal(keys[1], (1, outputs, inputs), jnp.float32)
    eight = pk.quantise(kernel, weights)
    return x, eight.values[0], eight.scale[0, 0]


def truth(x, weight, scale, bias=None):
    """float64, and the same of magnitudes: what roundings of sums are relative to."""
    x, weight = (np.asarray(value.astype(jnp.float32), np.float64) for value in (x, weight))
    weight = weight * np.asarray(scale, np.float64)[:, None]
    added = 0.0 if bias is None else np.asarray(bias.astype(jnp.float32), np.float64)
    return x @ weight.T + added, np.abs(x) @ np.abs(weight).T + np.abs(added)


def gelu(x):
    return 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))


def check(out, given, dtype=None):
    """Sums of n float32 products are off by n half steps at most; then a result is rounded once.

    dtype: of what the kernel was given, where the truth is told in another.
    """
    expected, sizes = truth(*given)
    dtype = given[0].dtype if dtype is None else jnp.dtype(dtype)
    step = {jnp.dtype(jnp.float32): 2.0**-24}.get(dtype, 2.0**-8)
    inputs = given[0].shape[-1]
    bound = inputs * 2.0**-24 * sizes + step * np.abs(expected) + 1e-30
    assert out.dtype == dtype
    assert (np.abs(np.asarray(out, np.float64) - expected) <= bound).all()


@pytest.mark.parametrize("weights", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_compilers_products_against_float64(dtype, weights):
    given = operands(dtype, weights)
    check(pk.weight_matmul(*given, implementation="xla"), given)


def check_finished(given, implementation):
    """With bias and GELU, whose slope is at most 1.13; a kernel's tanh is good to 2^-11 of it."""
    bias = jnp.linspace(-2, 2, len(given[1])).astype(jnp.bfloat16)
    out = pk.weight_matmul(*given, bias, gelu=True, implementation=implementation)
    before, sizes = truth(*given, bias)
    bound = 1.13 * given[0].shape[-1] * 2.0**-24 * sizes + 2.0**-8 * np.abs(gelu(before))
    rough = 2.0**-10 * np.abs(before)
    assert (np.abs(np.asarray(out, np.float64) - gelu(before)) <= bound + rough).all()


@pytest.mark.parametrize("weights", [INT8, E4M3], ids=str)
def test_bias_and_gelu_of_the_compilers_products(weights):
    check_finished(operands(jnp.bfloat16, weights), "xla")


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
    check_finished(given, "portable")


@needs_mosaic
@pytest.mark.parametrize(
    ("device", "dtype", "weights", "tokens", "server"),
    [
        (HOPPER, jnp.bfloat16, INT8, 1, "hopper"),
        (HOPPER, jnp.bfloat16, INT8, 16, "hopper"),
        (HOPPER, jnp.bfloat16, INT8, 144, "hopper"),
        (HOPPER, jnp.bfloat16, INT8, 400, "portable"),
        (HOPPER, jnp.bfloat16, E4M3, 144, "hopper"),
        (HOPPER, jnp.float16, INT8, 144, "portable"),
        (AMPERE, jnp.bfloat16, INT8, 144, "portable"),
        (AMPERE, jnp.bfloat16, E4M3, 144, "xla"),
        (HOPPER, jnp.float32, INT8, 144, "xla"),
        (HOPPER, jnp.bfloat16, INT8, 2000, "xla"),
    ],
)
def test_who_serves(device, dtype, weights, tokens, server, on):
    on(device)
    with backends.watch() as seen:
        jax.eval_shape(lambda *a: pk.weight_matmul(*a), *shapes(dtype, weights, tokens))
    assert seen == {("weight_matmul", server)}


@needs_mosaic
@pytest.mark.parametrize(
    ("device", "dtype", "weights", "named", "reason"),
    [
        (AMPERE, jnp.bfloat16, E4M3, "portable", "capability 8.9"),
        (HOPPER, jnp.float32, INT8, "portable", "16-bit activations"),
        (AMPERE, jnp.bfloat16, INT8, "hopper", "compute capability 9.0"),
        (HOPPER, jnp.float16, INT8, "hopper", "takes bfloat16; got float16"),
    ],
)
def test_what_a_kernel_cannot_serve_is_said(device, dtype, weights, named, reason, on):
    on(device)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(
            lambda *a: pk.weight_matmul(*a, implementation=named), *shapes(dtype, weights, 144)
        )


def shapes(dtype, weights, tokens):
    return (
        jax.ShapeDtypeStruct((2, tokens, 3584), dtype),
        jax.ShapeDtypeStruct((512, 3584), weights),
        jax.ShapeDtypeStruct((512,), jnp.float32),
    )


@needs_mosaic
@pytest.mark.parametrize(
    ("tokens", "inputs", "outputs", "weights"),
    [(1, 128, 128, INT8), (37, 3584, 384, E4M3), (144, 14336, 3584, INT8), (300, 384, 128, E4M3)],
    ids=["one step", "tails", "two groups of rows", "two tiles of rows"],
)
def test_hoppers_kernel_lowers(tokens, inputs, outputs, weights, on):
    on(HOPPER)
    given = (
        jax.ShapeDtypeStruct((2, tokens, inputs), jnp.bfloat16),
        jax.ShapeDtypeStruct((outputs, inputs), weights),
        jax.ShapeDtypeStruct((outputs,), jnp.float32),
        jax.ShapeDtypeStruct((outputs,), jnp.bfloat16),
    )
    call = jax.jit(lambda *a: pk.weight_matmul(*a, gelu=True, implementation="hopper"))
    call.trace(*given).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize(
    ("tiles", "inputs", "rows", "parts"), [(84, 3584, 16, 3), (112, 3584, 144, 1), (1, 256, 16, 2)]
)
def test_inputs_are_parted_where_that_fills_the_gpu(tiles, inputs, rows, parts):
    """By hand, of 132: 84 tiles of 3584 + 384 inputs, or two turns of 252 tiles of 1280 + 384."""
    assert parts_of(tiles, inputs, Tile.of(rows, 128), 132) == parts


@pytest.mark.parametrize(
    ("rows", "outputs", "tile"),
    [
        (2, 3584, (1, 8, 1, 4)),
        (72, 3584, (1, 80, 1, 4)),
        (72, 384, (1, 80, 1, 2)),  # no multiple of what four own
        (128, 3584, (1, 128, 1, 2)),
        (288, 3584, (2, 144, 1, 2)),
        (320, 3584, (2, 160, 1, 2)),
        (600, 3584, (2, 160, 2, 2)),
    ],
)
def test_tiles_hold_all_rows(rows, outputs, tile):
    found = Tile.of(rows, outputs)
    assert found == tile
    assert found.across * found.height >= rows


@pytest.mark.gpu
@pytest.mark.parametrize("weights", [INT8, E4M3], ids=str)
@pytest.mark.parametrize("named", ["portable", "hopper"])
@pytest.mark.parametrize("tokens", [1, 16, 37, 144, 255])
def test_the_kernels_on_a_gpu(tokens, weights, named):
    if named == "hopper" and (reason := hopper_reasons.device_reason(support.device_of())):
        pytest.skip(reason)
    for inputs, outputs in ((3584, 10752), (14336, 3584)):
        given = operands(jnp.bfloat16, weights, 2, tokens, inputs, outputs)
        call = jax.jit(functools.partial(pk.weight_matmul, implementation=named))
        poison = jnp.full((16 * 2 * tokens, outputs), jnp.nan, jnp.float32).block_until_ready()
        del poison
        out = call(*given)
        check(out, given)
        np.testing.assert_array_equal(np.asarray(out), np.asarray(call(*given)))
    for inputs, outputs in ((3584, 14336), (256, 14336)):  # in parts where rows are few, and whole
        check_finished(operands(jnp.bfloat16, weights, 2, tokens, inputs, outputs), named)


def test_what_float16_cannot_hold_becomes_its_largest():
    kernel = pytest.importorskip("pallas_kernels.hopper.weight_matmul")
    x = jnp.array([[1e6, -3e38, 65280, 1.5, -0.0]], jnp.bfloat16)
    expected = np.array([[65504, -65504, 65280, 1.5, 0]], np.float16)
    np.testing.assert_array_equal(kernel.in_float16(x), expected)


@pytest.mark.gpu
def test_large_activations_meet_e4m3_weights_as_the_largest_float16():
    if reason := hopper_reasons.device_reason(support.device_of()):
        pytest.skip(reason)
    x, weight, scale = operands(jnp.bfloat16, E4M3, 2, 16, 512, 256)
    x = x.at[0, 3, 5].set(1e6)
    out = pk.weight_matmul(x, weight, scale, implementation="hopper")
    exact = x.astype(jnp.float32).at[0, 3, 5].set(65504)  # bfloat16 has 65536 in its place
    check(out, (exact, weight, scale), jnp.bfloat16)


def test_other_weights_are_refused():
    x, weight, scale = operands(jnp.float32, INT8)
    with pytest.raises(ValueError, match="8-bit values are int8 or float8_e4m3fn; got int32"):
        pk.weight_matmul(x, weight.astype(jnp.int32), scale)
