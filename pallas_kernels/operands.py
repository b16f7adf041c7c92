"""What no attention kernel of ours takes, whatever it runs on."""

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
