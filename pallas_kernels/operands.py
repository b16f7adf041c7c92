"""What no kernel of ours takes, or takes only when asked to, whatever it runs on."""

from __future__ import annotations

import jax.numpy as jnp

from pallas_kernels import calls

HALVES = (jnp.bfloat16, jnp.float16)


def operands_reason(call: calls.CacheCall) -> str:
    """Why dtypes or head dim of an attention call do not suit; an empty string where they do."""
    q, k, v = call.q, call.k, call.v
    if q.dtype not in HALVES:
        return f"kernels take bfloat16 or float16 queries; got {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"kernels need one dtype for q, k and v; got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"kernels serve head dims 64 and 128; got {q.shape[-1]}"
    return ""


def rotary_operands_reason(call: calls.RotaryToCache) -> str:
    """Why kernels cannot take the dtypes of a fused rotary's operands."""
    qkv, k, v = call.qkv, call.k_cache, call.v_cache
    if qkv.dtype not in HALVES or not qkv.dtype == k.dtype == v.dtype:
        return f"the fused rotary takes one 16-bit dtype; got {qkv.dtype} and {k.dtype}"
    return ""


def norm_unasked(call: calls.ResidualNorm) -> str:
    """Wide results."""
    if call.dtype == jnp.float32:
        return "float32 results are left to the compiler, which rounds as everywhere else"
    return ""
