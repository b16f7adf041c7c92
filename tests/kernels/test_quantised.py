"""Products of 8-bit operands: exact sums, derived bounds, unusual rows; on the CPU and on a GPU."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import support
from pallas_kernels.hopper import reasons
from pallas_kernels.quantised import BLOCK, Eight

E4M3 = jnp.float8_e4m3fn
IMPLEMENTATIONS = ["xla", pytest.param("hopper", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _device(request):
    asked = getattr(request.node, "callspec", None)
    if asked and asked.params.get("implementation") == "hopper":
        reason = reasons.device_reason(support.device_of())
        if reason:
            pytest.skip(reason)


def operands(rows, depth, outputs, dtype, blocks=1, seed=0):
    """8-bit values of all sizes, scales far apart, biases."""
    generator = np.random.default_rng(seed)
    if dtype == jnp.int8:
        values, weight = (
            generator.integers(-127, 128, size, dtype=np.int8)
            for size in ((2, rows, depth), (outputs, depth))
        )
    else:
        values, weight = (
            generator.normal(size=size).astype(ml_dtypes.float8_e4m3fn)
            for size in ((2, rows, depth), (outputs, depth))
        )
    scale = np.exp(generator.normal(size=(blocks, 2, rows))).astype(np.float32)
    weight_scale = np.exp(generator.normal(size=outputs)).astype(np.float32) / depth**0.5
    bias = generator.normal(size=outputs).astype(np.float32)
    return Eight(*map(jnp.asarray, (values, scale))), *map(
        jnp.asarray, (weight, weight_scale, bias)
    )


def truth(x, weight, weight_scale, bias):
    """In float64, where products and sums of 8-bit values are exact."""
    values, scale = np.asarray(x.values, np.float64), np.asarray(x.scale, np.float64)
    blocks, (*_, depth) = len(scale), values.shape
    parts = values.reshape(*values.shape[:-1], blocks, depth // blocks)
    weights = np.asarray(weight, np.float64).reshape(-1, blocks, depth // blocks)
    sums = np.einsum("rtbk,obk,brt->rto", parts, weights, scale, optimize=True)
    return sums * weight_scale + bias


def check(got, want, *, relative):
    """Every value within a relative error of the size of its row."""
    got = np.asarray(got, np.float64)
    size = np.abs(want).max(axis=-1, keepdims=True)
    assert np.isfinite(got).all()
    assert (np.abs(got - want) <= relative * size).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("blocks", ["row", "block"])
@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
@pytest.mark.parametrize(("rows", "depth", "outputs"), [(2, 256, 128), (65, 512, 384)])
def test_products_are_right_to_their_rounding(implementation, blocks, dtype, rows, depth, outputs):
    x, *rest = operands(rows, depth, outputs, dtype, depth // BLOCK if blocks == "block" else 1)
    got = pk.quantised_matmul(x, *rest, implementation=implementation)
    # bfloat16 rounds by 2^-8; float32 sums of `depth` products lose depth * 2^-24 at the very most.
    # Tensor cores add e4m3 products in steps of 32 with 14 bits: 2^-13 of the largest sum each.
    relative = 2.0**-8 + (depth * 2.0**-24 if implementation == "xla" else depth / 32 * 2.0**-13)
    check(got, truth(x, *rest), relative=relative)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_integer_sums_are_exact_before_they_are_scaled(implementation):
    x, weight, *_ = operands(48, 1024, 256, jnp.int8)
    ones = Eight(x.values, jnp.full_like(x.scale, 2.0**-8))
    got = pk.quantised_matmul(ones, weight, jnp.ones(256), implementation=implementation)
    sums = np.einsum("rtk,ok->rto", np.asarray(x.values, np.int64), np.asarray(weight, np.int64))
    want = jnp.asarray(sums, jnp.float32).astype(jnp.float32) * 2.0**-8  # below 2^24: exact
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want.astype(jnp.bfloat16)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("into", [jnp.int8, E4M3])
def test_results_in_eight_bits_have_a_scale_for_every_block(implementation, into):
    x, *rest = operands(40, 256, 512, jnp.int8, seed=3)
    got = pk.quantised_matmul(x, *rest, gelu=True, dtype=into, implementation=implementation)
    want = np.asarray(jax.nn.gelu(truth(x, *rest), approximate=True), np.float64)
    blocks = want.reshape(2, 40, -1, BLOCK)
    top = np.abs(blocks).max(axis=-1)
    largest = 127 if into == jnp.int8 else 448
    np.testing.assert_allclose(np.moveaxis(np.asarray(got.scale), 0, -1), top / largest, rtol=2e-3)
    values = np.asarray(got.values, np.float64).reshape(blocks.shape)
    back = values * np.moveaxis(np.asarray(got.scale, np.float64), 0, -1)[..., None]
    # Half a step of int8; half of 2^-3 of a value of e4m3, or of its smallest step, 2^-9. The
    # kernel's tanh is good to 2^-11 of its value.
    step = top[..., None] * (0.5 / 127 if into == jnp.int8 else 2.0**-10 / 448)
    part = 0 if into == jnp.int8 else 2.0**-4
    assert (np.abs(back - blocks) <= 1.01 * step + (part + 2.0**-10) * np.abs(blocks) + 1e-4).all()


@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
@pytest.mark.parametrize("block", [None, BLOCK])
def test_unusual_rows(dtype, block):
    rows = np.zeros((1, 4, 512), np.float32)
    rows[0, 1, 3] = 3e4  # one outlier
    rows[0, 2] = 1e-42  # denormal
    rows[0, 3] = np.linspace(-2, 2, 512)
    eight = pk.quantise(jnp.asarray(rows), dtype, block)
    assert np.isfinite(np.asarray(eight.scale)).all()
    columns = np.repeat(np.moveaxis(np.asarray(eight.scale), 0, -1), block or 512, axis=-1)
    back = np.asarray(eight.values, np.float32) * columns
    assert np.isfinite(back).all()
    np.testing.assert_array_equal(back[0, 0], 0)
    np.testing.assert_allclose(back[0, 1, 3], 3e4, rtol=1e-6)
    assert np.abs(back[0, 2]).max() <= 1e-32
    bound = 2 / 127 / 2 if dtype == jnp.int8 else 2 * 2.0**-4
    assert np.abs(back[0, 3] - rows[0, 3]).max() <= bound * 1.001


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
@pytest.mark.parametrize(("rows", "width"), [(1, 512), (1000, 2048), (4096, 3584)])
def test_rows_rounded_by_the_kernel(rows, width, dtype):
    """As by the reference, but for values that lie half way between two, give or take 2^-20."""
    if reason := reasons.device_reason(support.device_of()):
        pytest.skip(reason)
    x = jax.random.normal(jax.random.key(0), (2, rows, width), jnp.bfloat16)
    x = x.at[0, 0].set(0)
    got = pk.quantise(x, dtype, implementation="hopper")
    want = pk.quantise(x, dtype, implementation="xla")
    np.testing.assert_allclose(np.asarray(got.scale), np.asarray(want.scale), rtol=2.0**-20)
    ours, theirs = (np.asarray(e.values, np.float32) for e in (got, want))
    np.testing.assert_array_equal(ours[0, 0], 0)
    step = np.maximum(np.abs(theirs) / 8, 2.0**-9) if dtype == E4M3 else 1
    assert (np.abs(ours - theirs) <= step).all()
    assert (ours != theirs).mean() < 1e-3


@pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")
def test_the_rounding_of_rows_lowers(monkeypatch):
    hopper = support.Device("gpu", capability=(9, 0), multiprocessors=132)
    monkeypatch.setattr(support, "device_of", lambda *operands: hopper)
    x = jax.ShapeDtypeStruct((2, 700, 3584), jnp.bfloat16)
    call = jax.jit(lambda x: pk.quantise(x, jnp.int8, implementation="hopper"))
    call.trace(x).lower(lowering_platforms=("cuda",))
    with pytest.raises(NotImplementedError, match="widths up to 4096 in steps of 512; got 640"):
        pk.quantise(jnp.ones((1, 4, 640), jnp.bfloat16), jnp.int8, implementation="hopper")


def test_a_long_tail_drowns_a_row_of_integers_but_not_of_floats():
    generator = np.random.default_rng(0)
    x = np.abs(generator.normal(size=(1, 8, 512))).astype(np.float32)
    x[..., 7] = 300 * np.median(x)
    rest = x[..., 8:]

    def lost(dtype):
        eight = pk.quantise(jnp.asarray(x), dtype)
        back = np.asarray(eight.values, np.float32)[..., 8:] * np.asarray(eight.scale)[0][..., None]
        return np.linalg.norm(back - rest) / np.linalg.norm(rest)

    assert lost(jnp.int8) > 0.3
    assert lost(E4M3) < 0.03


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "depth", "outputs"), [(1152, 2048, 6144), (4096, 3584, 10752)])
def test_the_kernel_repeats_itself_and_leaves_nothing_unwritten(rows, depth, outputs):
    if reason := reasons.device_reason(support.device_of()):
        pytest.skip(reason)
    x, *rest = operands(rows, depth, outputs, jnp.int8)
    call = jax.jit(lambda x: pk.quantised_matmul(x, *rest, implementation="hopper"))
    poison = jnp.full((8 * rows, outputs), jnp.nan, jnp.bfloat16)
    poison.block_until_ready()
    del poison
    first, second = call(x), call(x)
    assert np.isfinite(np.asarray(first, np.float32)).all()
    np.testing.assert_array_equal(np.asarray(first), np.asarray(second))


@pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")
@pytest.mark.parametrize("blocks", ["row", "block"])
@pytest.mark.parametrize("into", [jnp.bfloat16, jnp.int8, E4M3])
@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
def test_the_kernel_lowers(dtype, into, blocks, monkeypatch):
    hopper = support.Device("gpu", capability=(9, 0), multiprocessors=132)
    monkeypatch.setattr(support, "device_of", lambda *operands: hopper)
    x, *rest = operands(100, 512, 768, dtype, 2 if blocks == "block" else 1)

    def call(x):
        return pk.quantised_matmul(x, *rest, gelu=True, dtype=into, implementation="hopper")

    jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))


def test_what_does_not_fit_is_refused():
    x, weight, scale, bias = operands(4, 512, 256, jnp.int8)
    with pytest.raises(ValueError, match="one dtype"):
        pk.quantised_matmul(x, weight.astype(ml_dtypes.float8_e4m3fn), scale, bias)
    with pytest.raises(ValueError, match="int8 or float8_e4m3fn; got int16"):
        pk.quantise(jnp.ones((1, 2, 4)), jnp.int16)
    with pytest.raises(ValueError, match="blocks of 3 must divide"):
        pk.quantise(jnp.ones((1, 2, 4)), jnp.int8, 3)
    three = Eight(x.values, jnp.ones((3, 2, 4)))
    with pytest.raises(ValueError, match="got 3 for 512"):
        pk.quantised_matmul(three, weight, scale, bias)


def norm_operands(width, dtype=jnp.float32):
    generator = np.random.default_rng(5)
    x, branch = (generator.normal(size=(2, 9, width)).astype(np.float32) for _ in range(2))
    table = generator.normal(size=(2, 3, width)).astype(np.float32)
    return tuple(map(jnp.asarray, (x, branch, table)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
def test_a_norm_in_eight_bits_is_the_rounded_norm(implementation, dtype):
    x, branch, table = norm_operands(1024)
    given = x, branch, (table, 0), (table, 1), (table, 2)
    exact_x, exact = pk.residual_norm(*given, dtype=jnp.float32, implementation="xla")
    new, eight = pk.residual_norm(*given, dtype=dtype, implementation=implementation)
    np.testing.assert_allclose(np.asarray(new), np.asarray(exact_x), rtol=1e-6, atol=1e-6)
    top = np.abs(np.asarray(exact)).max(axis=-1)
    largest = 127 if dtype == jnp.int8 else 448
    np.testing.assert_allclose(np.asarray(eight.scale)[0], top / largest, rtol=1e-4)
    back = np.asarray(eight.values, np.float32) * np.asarray(eight.scale)[0][..., None]
    error = np.abs(back - np.asarray(exact))
    half = 0.5 / 127 if dtype == jnp.int8 else 2.0**-10 / 448
    part = 0 if dtype == jnp.int8 else 2.0**-4
    assert (error <= 1.01 * half * top[..., None] + (part + 1e-4) * np.abs(exact)).all()


@pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")
@pytest.mark.parametrize("dtype", [jnp.int8, E4M3])
@pytest.mark.parametrize("width", [2048, 3584])
def test_the_norm_in_eight_bits_lowers(width, dtype, monkeypatch):
    hopper = support.Device("gpu", capability=(9, 0), multiprocessors=132)
    monkeypatch.setattr(support, "device_of", lambda *operands: hopper)
    x, branch, table = norm_operands(width)

    def call(x):
        given = x, branch, (table, 0), (table, 1), (table, 2)
        return pk.residual_norm(*given, dtype=dtype, implementation="hopper")

    jax.jit(call).trace(x).lower(lowering_platforms=("cuda",))
