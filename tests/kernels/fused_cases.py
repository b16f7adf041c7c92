"""Inputs, float64 truths and tolerances of the fused operations.

Tolerances are in units of bfloat16's half step, 2^-8: a result that is rounded once may be off by
one such unit of its size; biases that are added in bfloat16 add another one.
"""

import jax.numpy as jnp
import numpy as np

from pallas_kernels import fused
from sparvar_jax.plans.schedule import ScaleSchedule, rotary_channels

HALF_STEP = 2.0**-8


def normal(seed, shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values.astype(np.float32).astype(dtype))


def float64(*arrays):
    return [np.asarray(array, np.float64) for array in arrays]


def assert_near(got, true, steps, floor=1.0):
    """Error in half steps of bfloat16, relative to values of at least `floor`."""
    (got,) = float64(got)
    assert np.isfinite(got).all()
    error = np.abs(got - true) / np.maximum(np.abs(true), floor)
    assert error.max() <= steps * HALF_STEP


def norm_inputs(rows=2, tokens=5, width=256, stream=jnp.float32):
    return dict(
        x=(3 + normal(0, (rows, tokens, width))).astype(stream),
        branch=normal(1, (rows, tokens, width), jnp.bfloat16),
        table=normal(2, (rows, 6, width)),
        bias=normal(3, (width,), jnp.bfloat16),
        affine=normal(4, (2, width), jnp.bfloat16),
    )


def norm_calls(inputs, **options):
    """The three uses in a block: after a branch, with an affine norm, and without a branch."""
    x, branch, table = inputs["x"], inputs["branch"], inputs["table"]
    bias, (weight, shift) = inputs["bias"], inputs["affine"]
    modulated = fused.residual_norm(
        x, branch, (table, 1), (table, 2), (table, 4), bias=bias, **options
    )
    affine = fused.residual_norm(
        x, branch, None, weight, shift, bias=bias, one_plus=False, **options
    )
    plain = fused.residual_norm(
        x, None, None, table[:, 2], table[:, 4], dtype=jnp.float32, **options
    )
    return modulated, affine, plain


def check_first_row_alone(**options):
    """A stream of one row meets the first row of every table."""
    inputs = norm_inputs()
    few = inputs | dict(x=inputs["x"][:1], branch=inputs["branch"][:1])
    for got, want in zip(norm_calls(few, **options), norm_calls(inputs, **options), strict=True):
        for alone, both in zip(got, want, strict=True):
            np.testing.assert_array_equal(alone, both[:1])


def norm_truth(inputs):
    """Per call: update, residual stream, its norm's gain, the modulated norm; float64."""
    x, branch, table, bias, affine = float64(*inputs.values())
    gain, scale, shift = (table[:, i, None] for i in (1, 2, 4))
    update = branch + bias
    calls = (gain * update, 1 + scale, shift), (update, *affine), (0 * x, 1 + scale, shift)
    for update, scale, shift in calls:
        new = x + update
        centred = new - new.mean(-1, keepdims=True)
        deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6)
        yield update, new, scale / deviation, centred / deviation * scale + shift


def check_norm(got, inputs):
    """Linear layers round branch plus bias to bfloat16 (kernels do not): half a step of the update.

    If no x of a token is off by more than e, nor is their mean or deviation, and a normed value is
    off by at most `(2 + |normed|) e / deviation`; |normed| stays below 5 here. A bfloat16 stream is
    rounded as well where it is updated.
    """
    stream = inputs["x"].dtype
    for (x, y), (update, new, slope, true_y) in zip(got, norm_truth(inputs), strict=True):
        assert x.dtype == stream
        allowed = HALF_STEP * np.abs(update) + 1e-6 * (1 + np.abs(new))
        if stream == jnp.bfloat16 and update.any():
            allowed += HALF_STEP * np.abs(new)
        assert (np.abs(float64(x)[0] - new) <= allowed).all()
        rounding = HALF_STEP if y.dtype == jnp.bfloat16 else 1e-6
        allowed = 7 * allowed.max(-1, keepdims=True) * np.abs(slope) + rounding * np.abs(true_y)
        assert (np.abs(float64(y)[0] - true_y) <= allowed + 1e-6).all()


GRIDS = ((2, 2), (3, 5))


def rotary_inputs(layout_name, heads=4, head_dim=64, rows=2, cached=3, scale=1, clear=0):
    schedule = ScaleSchedule.of(GRIDS)
    layout = schedule.layout(layout_name)
    (height, width), channels = GRIDS[scale], heads * head_dim
    cos, sin = (jnp.asarray(t) for t in rotary_channels(schedule, scale, head_dim))
    shape = (cached, heads, layout.total, head_dim)
    operands = dict(
        qkv=normal(0, (rows, height * width, 3 * channels), jnp.bfloat16),
        q_bias=normal(1, (channels,), jnp.bfloat16),
        v_bias=normal(2, (channels,), jnp.bfloat16),
        log_temperature=jnp.linspace(0.0, 6.0, heads).astype(jnp.bfloat16),
        cos=cos,
        sin=sin,
        k_cache=jnp.full(shape, 7.0, jnp.bfloat16),
        v_cache=jnp.full(shape, 7.0, jnp.bfloat16),
    )
    start, pitch = layout.spans[scale].start, layout.spans[scale].pitch
    place = dict(start=start, width=width, pitch=pitch, clear=clear)
    return operands, place, layout


def rotary_truth(operands, place):
    """Float64 queries, and caches in which only the scale's rows changed."""
    qkv, q_bias, v_bias, log_temperature, cos, sin, k_cache, v_cache = float64(*operands.values())
    rows, tokens, _ = qkv.shape
    heads, head_dim = k_cache.shape[1], k_cache.shape[3]
    q, k, v = np.moveaxis(qkv.reshape(rows, tokens, 3, heads, head_dim), 2, 0)
    q, v = q + q_bias.reshape(heads, head_dim), v + v_bias.reshape(heads, head_dim)
    turn = (cos[:, ::2] + 1j * sin[:, 1::2])[:, None]

    def rotate(x):
        x = x / np.linalg.norm(x, axis=-1, keepdims=True)
        pairs = (x[..., ::2] + 1j * x[..., 1::2]) * turn
        return np.stack([pairs.real, pairs.imag], -1).reshape(x.shape)

    q = rotate(q) * np.minimum(np.exp(log_temperature), 100.0)[:, None]
    for token in range(tokens):
        y, x = divmod(token, place["width"])
        row = place["start"] + y * place["pitch"] + x
        k_cache[:rows, :, row], v_cache[:rows, :, row] = rotate(k)[:, token], v[:, token]
    for y in range(tokens // place["width"]):
        first = place["start"] + y * place["pitch"]
        for cache in (k_cache, v_cache):
            cache[:rows, :, first + place["width"] : first + place["pitch"]] = 0
    end = place["start"] + tokens // place["width"] * place["pitch"]
    for cache in (k_cache, v_cache):
        cache[:rows, :, end : end + place["clear"]] = 0
    return q.transpose(0, 2, 1, 3), k_cache, v_cache


def check_rotary(got, truth):
    """Queries reach 100 and sit on a bias that may have been rounded: relative to their norm."""
    q, k, v = truth
    norm = np.linalg.norm(q, axis=-1, keepdims=True)
    assert_near(np.asarray(got[0], np.float64) / norm, q / norm, 2)
    assert_near(got[1], k, 1)
    assert_near(got[2], v, 2)


def cross_inputs(rows=2, tokens=72, heads=2, keys=24, head_dim=64):
    mask = jnp.arange(keys) < jnp.array([keys, 5])[:rows, None]
    bias = normal(3, (heads * head_dim,), jnp.bfloat16)
    q = normal(0, (rows, tokens, heads * head_dim), jnp.bfloat16)
    k, v = (normal(seed, (rows, heads, keys, head_dim), jnp.bfloat16) for seed in (1, 2))
    return q, k, v, mask, bias


def cross_truth(q, k, v, mask, bias):
    mask = np.asarray(mask)
    q, k, v, bias = float64(q, k, v, bias)
    heads = (q + bias).reshape(*q.shape[:2], k.shape[1], k.shape[3])
    scores = heads.swapaxes(1, 2) @ k.swapaxes(2, 3) * k.shape[3] ** -0.5
    scores = np.where(mask[:, None, None], scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v).swapaxes(1, 2).reshape(q.shape)
