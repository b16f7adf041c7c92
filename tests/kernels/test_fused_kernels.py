"""Fused kernels: interpreted on a CPU, lowered for CUDA from shapes alone, and run on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import fused, support
from pallas_kernels.hopper import reasons
from tests.kernels.fused_cases import (
    assert_near,
    check_first_row_alone,
    check_norm,
    check_rotary,
    cross_inputs,
    cross_truth,
    norm_calls,
    norm_inputs,
    rotary_inputs,
    rotary_truth,
)

needs_mosaic = pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")


@pytest.fixture(params=[1, 132])
def interpreted(monkeypatch, request):
    """Kernels run in the interpreter; few multiprocessors make CTAs loop. It knows no inline
    code and no matrix units, so these are written out."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    from pallas_kernels.hopper import fused_cross, fused_rotary

    def product(a, b):
        return jnp.dot(a, b, preferred_element_type=jnp.float32)

    def swap(x, layout):
        return x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)

    few = support.Device("gpu", capability=(9, 0), multiprocessors=request.param)
    monkeypatch.setattr(support, "device_of", lambda *operands: few)
    monkeypatch.setattr(fused_rotary, "swap_neighbours", swap)
    monkeypatch.setattr(fused_cross, "multiply_keys", lambda q, k: product(q[...], k[...].T))
    monkeypatch.setattr(fused_cross, "multiply_values", lambda weights, v: product(weights, v[...]))
    with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams()):
        yield


@needs_mosaic
def test_residual_norm_kernel_interpreted(interpreted):
    inputs = norm_inputs()
    check_norm(norm_calls(inputs, implementation="hopper"), inputs)
    check_first_row_alone(implementation="hopper")


@needs_mosaic
@pytest.mark.parametrize("clear", [0, 9])
@pytest.mark.parametrize("layout_name", ["packed", "aligned"])
def test_rotary_kernel_interpreted(interpreted, layout_name, clear):
    operands, place, _ = rotary_inputs(layout_name, clear=clear)
    got = fused.rotary_to_cache(**operands, **place, implementation="hopper")
    check_rotary(got, rotary_truth(operands, place))


@needs_mosaic
def test_cross_attention_kernel_interpreted(interpreted):
    q, k, v, mask, bias = inputs = cross_inputs()
    offsets = fused.text_offsets(mask, k, bias)
    out = fused.cross_attention(q, k, v, offsets, implementation="hopper")
    assert_near(out, cross_truth(*inputs), 2)
    alone = fused.cross_attention(q[:1], k, v, offsets, implementation="hopper")
    np.testing.assert_array_equal(alone, out[:1])


@needs_mosaic
def test_text_made_for_the_kernel_is_padded_once(interpreted):
    q, k, v, mask, bias = inputs = cross_inputs()
    k, v, offsets = fused.text_memory(mask, k, v, bias, implementation="hopper")
    assert k.shape[2] == v.shape[2] == offsets.shape[2] == 64
    out = fused.cross_attention(q, k, v, offsets, implementation="hopper")
    assert_near(out, cross_truth(*inputs), 2)


# --- lowering ---

GRID_SIDES = (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64)
MODELS = {"2b": (16, 128), "8b": (28, 128), "small": (6, 64)}


@pytest.fixture
def lowered(monkeypatch):
    """Lowers a call for CUDA from shapes alone; what does not fit the GPU fails here."""
    hopper = support.Device("gpu", capability=(9, 0))
    monkeypatch.setattr(support, "device_of", lambda *operands: hopper)

    def lower(function, *structs, donate=()):
        traced = jax.jit(function, donate_argnums=donate).trace(*structs)
        return traced.lower(lowering_platforms=("cuda",)).as_text()

    return lower


def struct(*shape, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(shape, dtype)


@needs_mosaic
@pytest.mark.parametrize("model", MODELS)
def test_residual_norm_lowers(lowered, model):
    heads, head_dim = MODELS[model]
    width = heads * head_dim

    def call(x, branch, table, bias):
        inputs = dict(x=x, branch=branch, table=table, bias=bias, affine=(bias, bias))
        return norm_calls(inputs, implementation="hopper")

    for side in GRID_SIDES:
        x, table = (struct(2, n, width, dtype=jnp.float32) for n in (side * side, 6))
        text = lowered(call, x, struct(*x.shape), table, struct(width))
        assert text.count("@mosaic_gpu") == 3
    for side in (1, 64):
        stream = struct(2, side * side, width)
        text = lowered(call, stream, stream, table, struct(width))
        assert text.count("@mosaic_gpu") == 3


@needs_mosaic
@pytest.mark.parametrize("model", MODELS)
def test_rotary_lowers_in_place(lowered, model):
    heads, head_dim = MODELS[model]
    width, cache = heads * head_dim, struct(2, heads, 10624, head_dim)
    for side in GRID_SIDES:
        table = struct(side * side, head_dim, dtype=jnp.float32)
        for pitch in {side, -(-side // 8) * 8}:
            place = dict(start=16, width=side, pitch=pitch, clear=40)
            text = lowered(
                lambda *a, place=place: fused.rotary_to_cache(*a, **place, implementation="hopper"),
                *(struct(1, side * side, 3 * width), struct(width), struct(width)),
                *(struct(heads), table, table, cache, cache),
                donate=(6, 7),
            )
            assert text.count("@mosaic_gpu") == 1
            assert text.count("output_operand_alias<") == 2


@needs_mosaic
@pytest.mark.parametrize("model", MODELS)
def test_cross_attention_lowers(lowered, model):
    heads, head_dim = MODELS[model]
    for side in GRID_SIDES:
        for keys in (24, 128):
            text = struct(2, heads, keys, head_dim)
            offsets = struct(2, heads, keys, dtype=jnp.float32)
            q = struct(2, side * side, heads * head_dim)
            call = lowered(
                lambda *a: fused.cross_attention(*a, implementation="hopper"),
                q,
                text,
                text,
                offsets,
            )
            assert call.count("@mosaic_gpu") == 1


# --- on the device ---


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 36, 333])
@pytest.mark.parametrize("width", [384, 2048, 3584])
def test_residual_norm_on_a_gpu(tokens, width):
    inputs = norm_inputs(tokens=tokens, width=width)
    check_norm(jax.jit(lambda i: norm_calls(i, implementation="hopper"))(inputs), inputs)


@pytest.mark.gpu
@pytest.mark.parametrize("layout_name", ["packed", "aligned"])
@pytest.mark.parametrize(("heads", "head_dim"), [(16, 128), (28, 128), (6, 64)])
def test_rotary_on_a_gpu(layout_name, heads, head_dim):
    operands, place, _ = rotary_inputs(layout_name, heads, head_dim, clear=9)
    truth = rotary_truth(operands, place)
    call = jax.jit(lambda o: fused.rotary_to_cache(**o, **place, implementation="hopper"))
    check_rotary(call(operands), truth)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 36, 1600])
@pytest.mark.parametrize("keys", [24, 64, 100])
@pytest.mark.parametrize(("heads", "head_dim"), [(28, 128), (6, 64)])
def test_cross_attention_on_a_gpu(tokens, keys, heads, head_dim):
    q, k, v, mask, bias = inputs = cross_inputs(2, tokens, heads, keys, head_dim)
    offsets = jax.jit(fused.text_offsets)(mask, k, bias)
    out = jax.jit(lambda *a: fused.cross_attention(*a, implementation="hopper"))(q, k, v, offsets)
    assert_near(out, cross_truth(*inputs), 2)
