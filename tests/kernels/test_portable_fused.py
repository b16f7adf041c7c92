"""The fused operations in Triton: interpreted on a CPU, lowered for CUDA, and run on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from pallas_kernels import fused, support
from pallas_kernels.portable import reasons
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

pytestmark = pytest.mark.skipif(bool(reasons.jax_reason()), reason=reasons.jax_reason() or "-")
AMPERE = support.Device("gpu", "NVIDIA A100-SXM4-80GB", (8, 0), 108)
ASKED = {"implementation": "portable"}


@pytest.fixture(params=[pytest.param(True, id="interpreted"),
                        pytest.param(False, marks=pytest.mark.gpu, id="gpu")])  # fmt: skip
def compiled(request, on, monkeypatch):
    """Calls through the interpreter, or compiled on a GPU; few multiprocessors: programs loop."""
    if not request.param:
        return jax.jit
    from pallas_kernels.portable import _triton as tri

    call = tri.call
    monkeypatch.setattr(tri, "call", lambda *a, **n: call(*a, **n | {"interpret": True}))
    on(support.Device("gpu", AMPERE.kind, AMPERE.capability, 1))
    return lambda function: function


@pytest.mark.parametrize(
    ("tokens", "width", "stream"),
    [(5, 256, jnp.float32), (37, 384, jnp.float32), (5, 384, jnp.bfloat16)],
)
def test_residual_norm(compiled, tokens, width, stream):
    inputs = norm_inputs(tokens=tokens, width=width, stream=stream)
    check_norm(compiled(lambda i: norm_calls(i, **ASKED))(inputs), inputs)


def test_a_stream_of_one_row_meets_the_first_row_of_tables(compiled):
    check_first_row_alone(**ASKED)


@pytest.mark.parametrize("clear", [0, 9])
@pytest.mark.parametrize("layout_name", ["packed", "aligned"])
def test_rotary(compiled, layout_name, clear):
    operands, place, _ = rotary_inputs(layout_name, clear=clear)
    call = compiled(lambda o: fused.rotary_to_cache(**o, **place, **ASKED))
    check_rotary(call(operands), rotary_truth(operands, place))


def test_rotary_by_angles_of_every_row(compiled):
    operands, place, _ = rotary_inputs("packed", head_dim=128, rows=2)
    want = rotary_truth(operands, place)
    spread = {name: jnp.stack([operands[name]] * 2) for name in ("cos", "sin")}
    call = compiled(lambda o: fused.rotary_to_cache(**o, **place, **ASKED))
    check_rotary(call(operands | spread), want)


@pytest.mark.parametrize(("keys", "head_dim"), [(24, 64), (100, 128)])
def test_cross_attention(compiled, keys, head_dim):
    q, k, v, mask, bias = inputs = cross_inputs(keys=keys, head_dim=head_dim)
    offsets = fused.text_offsets(mask, k, bias)
    call = compiled(lambda *a: fused.cross_attention(*a, **ASKED))
    out = call(q, k, v, offsets)
    assert_near(out, cross_truth(*inputs), 2)
    np.testing.assert_array_equal(call(q[:1], k, v, offsets), out[:1])


def test_text_that_is_all_padding_is_averaged(compiled):
    q, k, v, mask, bias = cross_inputs(rows=1)
    offsets = fused.text_offsets(jnp.zeros_like(mask), k, bias)
    out = compiled(lambda *a: fused.cross_attention(*a, **ASKED))(q, k, v, offsets)
    mean = np.asarray(v, np.float64).mean(2).reshape(1, 1, -1)
    assert_near(out, np.broadcast_to(mean, out.shape), 2)


def test_all_lower_in_place_for_the_released_sizes(on):
    if not hasattr(jax.sharding, "AbstractDevice"):
        pytest.skip("this jax lowers Triton kernels only where there is a GPU")
    on(AMPERE)
    named = jax.sharding.AbstractDevice(device_kind=AMPERE.kind, num_cores=None, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), abstract_device=named)

    def lower(function, *shapes, donate=()):
        with jax.sharding.use_abstract_mesh(mesh):
            traced = jax.jit(function, donate_argnums=donate).trace(*shapes)
            return traced.lower(lowering_platforms=("cuda",)).as_text()

    def struct(*shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype)

    def norm(x, branch, table, bias):
        given = dict(x=x, branch=branch, table=table, bias=bias, affine=(bias, bias))
        return norm_calls(given, **ASKED)

    for heads, head_dim, side in ((16, 128, 64), (28, 128, 6), (6, 64, 1)):
        width, tokens = heads * head_dim, side * side
        x, table = (struct(2, n, width, dtype=jnp.float32) for n in (tokens, 6))
        for stream in (x, struct(*x.shape)):
            assert "triton" in lower(norm, stream, struct(*x.shape), table, struct(width))
        cache, angles = struct(2, heads, 10624, head_dim), struct(tokens, head_dim, dtype="f4")
        place = dict(start=16, width=side, pitch=-(-side // 8) * 8, clear=40)
        text = lower(
            lambda *a, place=place: fused.rotary_to_cache(*a, **place, **ASKED),
            struct(1, tokens, 3 * width), struct(width), struct(width), struct(heads), angles,
            angles, cache, cache, donate=(6, 7),
        )  # fmt: skip
        assert text.count("output_operand_alias<") == 2
        text = struct(2, heads, 128, head_dim)
        offsets = struct(2, heads, 128, dtype=jnp.float32)
        call = lambda *a: fused.cross_attention(*a, **ASKED)  # noqa: E731
        assert "triton" in lower(call, struct(2, tokens, width), text, text, offsets)


def test_what_is_left_to_the_compiler(on):
    on(AMPERE)
    inputs = norm_inputs()
    with pytest.raises(NotImplementedError, match="16 or 32 bits"):
        norm_calls(inputs, dtype=jnp.int8, **ASKED)
    with pytest.raises(NotImplementedError, match="float32 residual"):
        norm_calls(inputs | {"x": inputs["x"].astype(jnp.float16)}, **ASKED)
    q, k, v, mask, bias = cross_inputs(keys=129)
    offsets = fused.text_offsets(mask, k, bias)
    with pytest.raises(NotImplementedError, match="up to 128 keys"):
        fused.cross_attention(q, k, v, offsets, **ASKED)
    operands, place, _ = rotary_inputs("packed", head_dim=32)
    with pytest.raises(NotImplementedError, match="head dims 64 and 128; got 32"):
        fused.rotary_to_cache(**operands, **place, **ASKED)
