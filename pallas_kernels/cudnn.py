"""The backend "cudnn": dense attention by cuDNN's flash kernel, through jax."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.backends import Backend
from pallas_kernels.calls import Attention


def reason(call: Attention) -> str:
    """Why cuDNN cannot serve: device, dtypes, head dim, or what the call asks for."""
    head_dim = call.q.shape[-1]
    if not call.device.is_cuda:
        return f"cuDNN needs a CUDA device; the call's device is {call.device.platform}"
    if (call.device.capability or (0, 0)) < (8, 0):
        return "cuDNN attention needs compute capability 8.0 or newer"
    if call.q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN attention takes 16-bit floats; got {call.q.dtype}"
    if head_dim % 8 or head_dim > 128:
        return f"cuDNN attention takes head dims up to 128 in steps of 8; got {head_dim}"
    if call.return_lse:
        return "cuDNN attention gives no log-sum-exp"
    if call.gaps:
        return "cuDNN attention reads all keys up to kv_length; got gaps"
    return ""


def attention(call: Attention) -> Float[Array, "R2 H T D"]:
    """Dense attention over the first `kv_length` cache rows."""
    rows = call.q.shape[0]
    swap = functools.partial(jnp.swapaxes, axis1=1, axis2=2)
    k, v = (x[:rows, :, : call.kv_length] for x in (call.k, call.v))
    out = jax.nn.dot_product_attention(
        swap(call.q), swap(k), swap(v), scale=call.scale, implementation="cudnn"
    )
    return swap(out)


SERVED = {"attention": Backend("cudnn", reason, attention)}
"""The backend of every operation that it has."""
