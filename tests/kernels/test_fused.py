"""References of the fused operations against float64 and the model's own code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import backends, fused, support
from pallas_kernels.hopper import reasons
from sparvar_jax.models import layers
from sparvar_jax.models.stream import Stream
from sparvar_jax.plans.stores import write_rows
from tests.kernels.fused_cases import (
    assert_near,
    check_first_row_alone,
    check_norm,
    check_rotary,
    cross_inputs,
    cross_truth,
    float64,
    norm_calls,
    norm_inputs,
    rotary_inputs,
    rotary_truth,
)

# --- residual_norm ---


def rotate(x, cos, sin):
    """Adjacent pairs (2a, 2a + 1) of each head as complex numbers, turned by angle a."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    turned = (pairs[..., 0] + 1j * pairs[..., 1]) * (cos + 1j * sin)
    return jnp.stack([turned.real, turned.imag], axis=-1).reshape(x.shape)


@pytest.mark.parametrize("stream", [jnp.float32, jnp.bfloat16])
def test_residual_norm_reference_is_right(stream):
    inputs = norm_inputs(stream=stream)
    check_norm(norm_calls(inputs), inputs)


def test_residual_norm_reference_gives_the_bits_of_the_model():
    inputs = norm_inputs()
    x, branch, table = inputs["x"], inputs["branch"], inputs["table"]
    new, y = fused.residual_norm(x, branch, (table, 1), (table, 3), (table, 5))
    np.testing.assert_array_equal(new, x + table[:, 1, None] * branch)
    want = layers.modulate(new, table[:, 3], table[:, 5]).astype(jnp.bfloat16)
    np.testing.assert_array_equal(y, want)


def test_an_update_left_to_the_next_norm_gives_the_bits_of_one_made_at_once():
    inputs = norm_inputs()
    x, branch, table, bias = (inputs[name] for name in ("x", "branch", "table", "bias"))
    stream = Stream(x, branch, table, bias, index=1)
    made = x + table[:, 1, None] * (branch + bias)
    want = layers.modulate(made, table[:, 2], table[:, 4]).astype(jnp.bfloat16)
    for stands in (stream, Stream(made)):
        settled, y = stands.normed(table, 2, 4, layers.Precision().compute, None)
        np.testing.assert_array_equal(settled, made)
        np.testing.assert_array_equal(stands.settled(), made)
        np.testing.assert_array_equal(y, want)


@pytest.mark.parametrize("gain", [(1,), ()])
def test_the_norm_of_a_bfloat16_stream_is_that_of_what_the_next_block_reads(gain):
    """One rounding an update, of a float32 sum; compiled too, where XLA drops casts in pairs."""
    inputs = norm_inputs(stream=jnp.bfloat16)
    x, branch, table, bias = (inputs[name] for name in ("x", "branch", "table", "bias"))
    stream = Stream(x, branch, table if gain else None, bias, index=1)
    want = (x.astype(jnp.float32) + stream.update()).astype(jnp.bfloat16)
    np.testing.assert_array_equal(stream.settled(), want)
    for run in (lambda f: f, jax.jit):
        normed = run(lambda s: s.normed(table, 2, 4, jnp.dtype(jnp.float32), None))
        settled, y = normed(stream)
        np.testing.assert_array_equal(run(Stream.settled)(stream), settled)
        _, again = normed(Stream(settled))
        np.testing.assert_allclose(y, again, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(scale=jnp.ones((2, 128))), "scale must be"),
        (dict(scale=(jnp.ones((2, 6, 256)), 6)), "index 6"),
        (dict(branch=None, gain=jnp.ones(256)), "without a branch"),
        (dict(branch=jnp.ones((2, 4, 256))), "branch must have"),
    ],
)
@pytest.mark.unchecked
def test_residual_norm_refuses_what_does_not_fit(change, message):
    ones = jnp.ones(256)
    x = jnp.ones((2, 5, 256))
    arguments = dict(x=x, branch=x, gain=None, scale=ones, shift=ones) | change
    with pytest.raises(ValueError, match=message):
        fused.residual_norm(**arguments)


# --- rotary_to_cache ---


@pytest.mark.parametrize("clear", [0, 9])
@pytest.mark.parametrize("layout_name", ["packed", "aligned"])
def test_rotary_reference_is_right(layout_name, clear):
    operands, place, _ = rotary_inputs(layout_name, clear=clear)
    check_rotary(fused.rotary_to_cache(**operands, **place), rotary_truth(operands, place))


@pytest.mark.parametrize("layout_name", ["packed", "aligned"])
def test_rotary_reference_gives_the_bits_of_plain_layers(layout_name):
    operands, place, layout = rotary_inputs(layout_name)
    place = layout.slot(1)._asdict()
    heads = operands["k_cache"].shape[1]
    q, k, v = jnp.split(operands["qkv"], 3, axis=-1)
    q = layers.split_heads(q + operands["q_bias"], heads)
    k, v = layers.split_heads(k, heads), layers.split_heads(v + operands["v_bias"], heads)
    bounded = jnp.minimum(
        operands["log_temperature"].astype(jnp.float32), layers.MAX_LOG_TEMPERATURE
    )
    positions = operands["cos"][:, ::2], operands["sin"][:, 1::2]
    q = rotate(layers.unit(q) * jnp.exp(bounded)[:, None, None], *positions)
    k = rotate(layers.unit(k), *positions)
    want = (
        q.astype(jnp.bfloat16),
        write_rows(operands["k_cache"], k.astype(jnp.bfloat16), layout.slot(1)),
        write_rows(operands["v_cache"], v, layout.slot(1)),
    )
    for got, wanted in zip(fused.rotary_to_cache(**operands, **place), want, strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_rotary_by_row_is_every_row_by_itself():
    operands, place, _ = rotary_inputs("aligned")
    tables = {name: jnp.stack([operands[name], operands[name][::-1]]) for name in ("cos", "sin")}
    together = fused.rotary_to_cache(**(operands | tables), **place)
    for row in range(2):
        own = {name: table[row] for name, table in tables.items()}
        alone = fused.rotary_to_cache(**(operands | own), **place)
        for got, wanted in zip(together, alone, strict=True):
            np.testing.assert_array_equal(got[row], wanted[row])


@pytest.mark.skipif(bool(reasons.jax_reason()), reason="needs jax 0.11")
def test_rotary_by_row_is_left_to_others(monkeypatch):
    """On a Hopper GPU too, where its own kernel serves angles that rows share."""
    operands, place, _ = rotary_inputs("packed")
    tables = {name: jnp.stack([operands[name]] * 2) for name in ("cos", "sin")}
    hopper = support.Device("gpu", capability=(9, 0))
    monkeypatch.setattr(support, "device_of", lambda *operands: hopper)
    with pytest.raises(NotImplementedError, match="angles that all rows share"):
        fused.rotary_to_cache(**(operands | tables), **place, implementation="hopper")
    with backends.use("xla"):
        by_row = fused.rotary_to_cache(**(operands | tables), **place)
    shared = fused.rotary_to_cache(**operands, **place, implementation="xla")
    for got, wanted in zip(by_row, shared, strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.unchecked
def test_rotary_refuses_what_does_not_fit():
    operands, place, _ = rotary_inputs("packed")
    with pytest.raises(ValueError, match="cos and sin must both be"):
        fused.rotary_to_cache(**(operands | dict(cos=operands["cos"][None])), **place)
    with pytest.raises(ValueError, match="must fill a grid"):
        fused.rotary_to_cache(**operands, **(place | dict(start=120)))
    with pytest.raises(ValueError, match="cleared ones fit"):
        fused.rotary_to_cache(**operands, **(place | dict(clear=128)))
    with pytest.raises(ValueError, match="qkv must be"):
        fused.rotary_to_cache(**(operands | dict(qkv=operands["qkv"][..., 1:])), **place)


# --- cross_attention ---


def test_cross_attention_reference_is_right():
    q, k, v, mask, bias = inputs = cross_inputs()
    out = fused.cross_attention(q, k, v, fused.text_offsets(mask, k, bias))
    assert_near(out, cross_truth(*inputs), 2)


def test_cross_attention_reference_agrees_with_the_model():
    """Weights and output are rounded at the same places; sums may be ordered otherwise."""
    q, k, v, mask, _ = cross_inputs()
    query = layers.split_heads(q, k.shape[1])
    want = layers.masked_attention(query, k, v, mask, layers.Precision("bfloat16"))
    got = fused.cross_attention(q, k, v, fused.text_offsets(mask, k))
    assert_near(got, *float64(layers.merge_heads(want)), 2)


def test_text_for_the_reference_is_left_as_it_is():
    _, k, v, mask, bias = cross_inputs()
    keys, values, offsets = fused.text_memory(mask, k, v, bias)
    assert keys is k
    assert values is v
    np.testing.assert_array_equal(offsets, fused.text_offsets(mask, k, bias))


def test_rows_of_tables_and_texts_beyond_those_of_the_stream_do_not_count():
    check_first_row_alone()
    q, k, v, mask, bias = cross_inputs()
    offsets = fused.text_offsets(mask, k, bias)
    got = fused.cross_attention(q[:1], k, v, offsets)
    np.testing.assert_array_equal(got, fused.cross_attention(q, k, v, offsets)[:1])


@pytest.mark.unchecked
def test_cross_attention_refuses_what_does_not_fit():
    q, k, v, mask, _ = cross_inputs()
    with pytest.raises(ValueError, match="offsets must be"):
        fused.cross_attention(q, k, v, fused.text_offsets(mask, k)[..., 1:])
    with pytest.raises(ValueError, match="q must be"):
        fused.cross_attention(q[..., 1:], k, v, fused.text_offsets(mask, k))


def test_a_named_kernel_fails_loudly_without_its_device():
    if not reasons.device_reason(support.device_of()):
        pytest.skip("this device runs the kernels")
    inputs = norm_inputs()
    with pytest.raises(NotImplementedError, match="Hopper kernels need"):
        norm_calls(inputs, implementation="hopper")
