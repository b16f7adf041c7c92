"""One call of every portable kernel, at the sizes of released models: what `assemble` builds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from benchmarks import kernel_cases
from pallas_kernels import shapes

ROWS, SCALE, GROUP = 2, 12, kernel_cases.GROUP
Case = tuple[Callable[..., Any], tuple[jax.ShapeDtypeStruct, ...]]
"""A function that asks for the portable kernels, and what it is traced with."""


def cases() -> dict[str, Case]:
    """By name: operation, head dim or width, and what else chooses another program."""
    found = {}
    for head_dim, heads in ((128, 28), (64, 24)):
        found |= {f"{name}/{head_dim}": made for name, made in _attention(heads, head_dim).items()}
        found |= {f"{name}/{head_dim}": made for name, made in _fused(heads, head_dim).items()}
    found["norm/2048"] = _norm(2048)
    found["norm/3584"] = _norm(3584)
    for tokens in (1, 16, 144):
        given = _struct(ROWS, tokens, 3584), _struct(10752, 3584, dtype=jnp.int8)
        scale = _struct(10752, dtype=jnp.float32)
        found[f"weights/{tokens}"] = (_asked(pk.weight_matmul), (*given, scale))
    sums = jax.ShapeDtypeStruct((ROWS, 28, 9, 4121), jnp.float32)
    found["select/4121"] = (_asked(pk.select_columns, 784), (sums,))
    return found


def _asked(function: Callable[..., Any], *rest: Any, **named: Any) -> Callable[..., Any]:
    return lambda *operands: function(*operands, *rest, **named, implementation="portable")


def _struct(*shape: int, dtype: Any = jnp.bfloat16) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def _operands(heads: int, queries: int, keys: int, head_dim: int, dtype: Any = jnp.bfloat16):
    q = _struct(ROWS, heads, queries, head_dim, dtype=dtype)
    k = _struct(ROWS, heads, shapes.round_up(keys, 128), head_dim, dtype=dtype)
    return q, k, k


def _attention(heads: int, head_dim: int) -> dict[str, Case]:
    """Attention at the last scale, with a bound of logits as the models have it and without."""
    geometry, windows, sinks = kernel_cases.geometry(SCALE)
    queries, keys = geometry.height * geometry.width, geometry.kv_length
    aligned = pk.Geometry.aligned(shapes.SQUARE_GRIDS)
    given = _operands(heads, queries, keys, head_dim)
    blocks = pk.csla_blocks(geometry, windows, sinks)
    narrow = pk.csla_blocks(geometry, windows, sinks, 128, 64)
    found: dict[str, Case] = {}
    for kind, named in (("bounded", {"logit_bound": 100.0}), ("online", {})):
        calls = {
            "dense": _asked(pk.attention, keys, **named),
            "blocks": _asked(pk.block_sparse_attention, blocks, **named),
            "blocks-64": _asked(pk.block_sparse_attention, narrow, **named),
            "boxes": _asked(pk.window_attention, geometry, windows, sinks, **named),
            "boxes-exact": _asked(
                pk.window_attention, geometry, windows, sinks, exact=True, **named
            ),
        }
        found |= {f"{name}/{kind}": (call, given) for name, call in calls.items()}
        gaps = _asked(pk.attention, aligned.kv_length, gaps=aligned.gaps, **named)
        found[f"dense-gaps/{kind}"] = (
            gaps, _operands(heads, queries, aligned.kv_length, head_dim)
        )  # fmt: skip
        for granularity in (1, 8):
            for group in (64, GROUP):
                name = f"columns-{granularity}/{kind}/{group}"
                found[name] = _columns(given, keys, group, granularity, named)
    half = _operands(heads, queries, keys, head_dim, jnp.float16)
    found["dense/float16"] = (_asked(pk.attention, keys, return_lse=True), half)
    sums = _asked(lambda *a, **n: pk.attention_column_sums(*a, **n)[1], 4121, GROUP)
    found["column-sums"] = (sums, _operands(heads, 1600, 4121, head_dim))
    return found


def _columns(given, keys: int, group: int, granularity: int, named: dict[str, Any]) -> Case:
    kept, groups = kernel_cases.COLUMNS[SCALE] // granularity, -(-given[0].shape[2] // group)
    lead = (*given[0].shape[:2], groups)
    lists = _struct(*lead, kept, dtype=jnp.int32), _struct(*lead, dtype=jnp.int32)
    named = dict(named, kv_length=keys, group=group, granularity=granularity)
    return _asked(pk.column_sparse_attention, **named), (*given, *lists)


def _fused(heads: int, head_dim: int) -> dict[str, Case]:
    """Rotary positions into the cache of the last scale, and attention to a prompt."""
    width, tokens, side = heads * head_dim, 4096, 64
    angles = _struct(tokens, head_dim, dtype=jnp.float32)
    cache = _struct(ROWS, heads, 10624, head_dim)
    rotary = _asked(pk.rotary_to_cache, start=6425, width=side, pitch=side, clear=40)
    qkv = _struct(ROWS, tokens, 3 * width)
    given = (qkv, _struct(width), _struct(width), _struct(heads), angles, angles, cache, cache)
    text, offsets = _struct(ROWS, heads, 64, head_dim), _struct(ROWS, heads, 64, dtype=jnp.float32)
    cross = (_struct(ROWS, tokens, width), text, text, offsets)
    return {"rotary": (rotary, given), "cross": (_asked(pk.cross_attention), cross)}


def _norm(width: int) -> Case:
    x, table = (_struct(ROWS, n, width, dtype=jnp.float32) for n in (4096, 6))

    def norm(x, branch, table, bias):
        return pk.residual_norm(
            x, branch, (table, 1), (table, 2), (table, 4), bias=bias, implementation="portable"
        )

    return norm, (x, _struct(*x.shape), table, _struct(width))
