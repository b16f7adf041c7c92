"""The fused operations: residual update and norm, rotary positions into the cache, cross attention.

Each reads its inputs once and writes its results once; what is done is in `xla/fused.py`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as pltriton
from jaxtyping import Array, Float

from pallas_kernels import calls
from pallas_kernels.fused_shapes import EPSILON
from pallas_kernels.portable import _triton as tri
from pallas_kernels.portable.tuning import Launch
from pallas_kernels.shapes import ceil_div

_POSITIONS = 16  # cache rows that a program of the rotary kernel writes
_SMALLEST_SQUARE = 1e-24
_TILE = 64  # queries that a program of cross attention takes


def residual_norm(call: calls.ResidualNorm) -> tuple[Array, Array]:
    """The residual stream and its modulated norm; a program walks a few tokens of one row."""
    x, branch = call.x, call.branch
    rows, tokens, width = x.shape
    operands = {"x": x} if branch is None else {"x": x, "branch": branch}
    operands |= {name: table for name, (table, _) in call.vectors.items()}
    padded = 1 << (width - 1).bit_length()
    chunk = max(1, min(4, rows * tokens // (8 * call.device.multiprocessors)))

    def residual_norm_kernel(*refs):
        given, outs = dict(zip(operands, refs, strict=False)), refs[len(operands) :]
        columns = jnp.arange(padded, dtype=jnp.int32)
        there = columns < width
        row, first = pl.program_id(1), pl.program_id(0) * chunk

        def vector(name):
            table, (array, index) = given[name], call.vectors[name]
            at = table.at[row if len(array) > 1 else 0, index, columns]
            return pltriton.load(at, mask=there, other=0.0).astype(jnp.float32)

        vectors = {name: vector(name) for name in call.vectors}

        def step(number, carry):
            token = first + number
            seen = there & (token < tokens)
            new = pltriton.load(given["x"].at[row, token, columns], mask=seen, other=0.0)
            new = new.astype(jnp.float32)
            if branch is not None:
                at = given["branch"].at[row, token, columns]
                update = pltriton.load(at, mask=seen, other=0.0).astype(jnp.float32)
                update = update + vectors["bias"] if "bias" in vectors else update
                new = new + (vectors["gain"] * update if "gain" in vectors else update)
                kept = new.astype(x.dtype)
                pltriton.store(outs[0].at[row, token, columns], kept, mask=seen)
                new = kept.astype(jnp.float32)
            centred = jnp.where(there, new - new.sum() * (1.0 / width), 0.0)
            deviation = (centred * centred).sum() * (1.0 / width) + EPSILON
            scale = 1.0 + vectors["scale"] if call.one_plus else vectors["scale"]
            y = centred * lax.rsqrt(deviation) * scale + vectors["shift"]
            pltriton.store(outs[-1].at[row, token, columns], y.astype(outs[-1].dtype), mask=seen)
            return carry

        lax.fori_loop(jnp.int32(0), jnp.int32(chunk), step, jnp.int32(0))

    out = [jax.ShapeDtypeStruct(x.shape, dtype) for dtype in (x.dtype, call.dtype)]
    launch = Launch(warps=max(1, min(16, padded // 512)), stages=1)
    grid = (ceil_div(tokens, chunk), rows)
    made = tri.call(
        residual_norm_kernel, out if branch is not None else out[1:], grid, launch,
        *operands.values(),
    )  # fmt: skip
    return (x, made[0]) if branch is None else (made[0], made[1])


def rotary_to_cache(
    call: calls.RotaryToCache,
) -> tuple[Float[Array, "R H T D"], Float[Array, "Rk H S D"], Float[Array, "Rk H S D"]]:
    """Queries, and the caches with a scale's rows written in place: a program has one head."""
    rows, tokens, _, heads, head_dim = call.qkv.shape
    place, most = call.place, call.max_log_temperature
    walked = place.span + place.clear

    def rotary_to_cache_kernel(qkv, q_bias, v_bias, log_temperature, cos, sin, *refs):
        q_out, k_out, v_out = refs[2:]
        head, row = lax.rem(pl.program_id(0), heads), pl.program_id(1)
        position = lax.div(pl.program_id(0), heads) * _POSITIONS
        position = position + jnp.arange(_POSITIONS, dtype=jnp.int32)
        y, x = lax.div(position, place.pitch), lax.rem(position, place.pitch)
        seen, token = (x < place.width) & (y < place.height), y * place.width + x
        columns = jnp.arange(head_dim, dtype=jnp.int32)
        shown = tri.spread(seen, head_dim)
        q, k, v = (
            tri.load_rows(qkv, (row,), token, seen, (part, head)).astype(jnp.float32)
            for part in range(3)
        )
        bias = [
            pltriton.load(ref.at[head, columns]).astype(jnp.float32)[None]
            for ref in (q_bias, v_bias)
        ]
        lead = (row,) if call.cos.ndim == 3 else ()
        angles = [tri.load_rows(ref, lead, token, seen) for ref in (cos, sin)]
        angles = [angle.astype(jnp.float32) for angle in angles]
        temperature = jnp.exp(jnp.minimum(log_temperature[head].astype(jnp.float32), most))
        turned = _turn(q + bias[0], angles, temperature)
        tri.store_rows(q_out, (row, head), token, (), seen, turned)
        inside, at = position < walked, place.start + position
        for ref, value in ((k_out, _turn(k, angles)), (v_out, v + bias[1])):
            tri.store_rows(ref, (row, head), at, (), inside, jnp.where(shown, value, 0.0))

    like = call.k_cache, call.v_cache
    out = [jax.ShapeDtypeStruct((rows, heads, tokens, head_dim), call.k_cache.dtype)]
    out += [jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in like]
    grid = (ceil_div(walked, _POSITIONS) * heads, rows)
    q, k, v = tri.call(
        rotary_to_cache_kernel, out, grid, Launch(warps=4, stages=1), call.qkv, call.q_bias,
        call.v_bias, call.log_temperature, call.cos, call.sin, *like, in_place={6: 1, 7: 2},
    )  # fmt: skip
    return q, k, v


def _turn(x: Float[Array, "P D"], angles: list[Array], factor: Any = 1.0) -> Float[Array, "P D"]:
    """Unit vectors times `factor`, turned by their tokens' angles."""
    square = (x * x).sum(1)
    x = x * (lax.rsqrt(jnp.maximum(square, _SMALLEST_SQUARE)) * factor)[:, None]
    cos, sin = angles
    return x * cos + _swap_neighbours(x) * sin


def _swap_neighbours(x: Float[Array, "P D"]) -> Float[Array, "P D"]:
    """Channels 2i and 2i + 1 in each other's place: a thread holds both."""
    pairs = x.reshape(x.shape[0], -1, 2)
    second = lax.broadcasted_iota(jnp.int32, pairs.shape, 2) == 1
    even, odd = (jnp.where(second == which, pairs, 0.0).sum(2) for which in (False, True))
    even, odd = (jnp.broadcast_to(part[..., None], pairs.shape) for part in (even, odd))
    return jnp.where(second, even, odd).reshape(x.shape)


def cross_attention(call: calls.CrossAttention) -> Float[Array, "R T C"]:
    """All keys of a prompt at once: a program has a tile of queries of one head."""
    rows, tokens, _ = call.q.shape
    heads, keys, head_dim = call.k.shape[1:]
    padded = max(16, 1 << (keys - 1).bit_length())

    def cross_attention_kernel(q_ref, k_ref, v_ref, offsets, out_ref):
        item = pl.program_id(1)
        row, head = lax.div(item, heads), lax.rem(item, heads)
        token = pl.program_id(0) * _TILE + jnp.arange(_TILE, dtype=jnp.int32)
        column = head * head_dim + jnp.arange(head_dim, dtype=jnp.int32)
        there = tri.spread(token < tokens, head_dim)
        at = token[:, None], column[None, :]
        q = pltriton.load(q_ref.at[(row, *at)], mask=there, other=0.0)
        key = jnp.arange(padded, dtype=jnp.int32)
        seen = key < keys
        k, v = (tri.load_rows(ref, (row, head), key, seen) for ref in (k_ref, v_ref))
        offset = pltriton.load(offsets.at[row, head, key], mask=seen, other=0.0) * tri.LOG2E
        # A prompt that is all padding still has a softmax.
        offset = jnp.where(seen, jnp.maximum(offset, tri.LOWEST), -jnp.inf)
        scores = tri.product(q, k, 1) * (call.scale * tri.LOG2E) + offset[None]
        weights = jnp.exp2(scores - scores.max(1)[:, None])
        out = tri.product(weights.astype(v.dtype), v, 0) / weights.sum(1)[:, None]
        pltriton.store(out_ref.at[(row, *at)], out.astype(out_ref.dtype), mask=there)

    out = jax.ShapeDtypeStruct(call.q.shape, call.q.dtype)
    grid = (ceil_div(tokens, _TILE), rows * heads)
    launch = Launch(warps=4, stages=1)
    return tri.call(cross_attention_kernel, out, grid, launch, call.q, call.k, call.v, call.offsets)
