"""What the Hopper kernels cannot serve, as reasons: an empty string means that they can."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import calls
from pallas_kernels.operands import HALVES, operands_reason, rotary_operands_reason
from pallas_kernels.support import Device
from pallas_kernels.xla.quantised import LARGEST

# Releases before have never run the kernels; on later ones they are lowered before they are chosen.
_FIRST, _LAST_TESTED = (0, 11), (0, 12)


def jax_reason() -> str:
    """Why this jax cannot build the kernels."""
    if jax.__version_info__[:2] < _FIRST:
        return f"Hopper kernels need jax 0.11 or newer; this is {jax.__version__}"
    return ""


def jax_is_tested() -> bool:
    """Whether the tests lower every kernel with this release of jax."""
    return _FIRST <= jax.__version_info__[:2] <= _LAST_TESTED


def device_reason(device: Device) -> str:
    """Why a device cannot run the kernels."""
    if not device.is_cuda:
        return f"Hopper kernels need a Hopper GPU; the call's device is {device.platform}"
    if device.capability != (9, 0):
        major, minor = device.capability or (0, 0)
        return f"Hopper kernels need compute capability 9.0; the call's device has {major}.{minor}"
    return jax_reason()


def cache_reason(call: calls.CacheCall) -> str:
    """Device, dtypes, head dim and cache rows of an attention call."""
    if reason := device_reason(call.device) or operands_reason(call):
        return reason
    if call.k.shape[2] % 8:
        return f"kernels need a cache whose row count is a multiple of 8; got {call.k.shape[2]}"
    return ""


def blocks_reason(call: calls.BlockSparseAttention) -> str:
    """As `cache_reason`, and block sizes."""
    size = (call.blocks.block_q, call.blocks.block_k)
    if (reason := cache_reason(call)) or size in ((128, 64), (128, 128)):
        return reason
    return (
        "the block-list kernel takes query blocks of 128 and key blocks of 64 or 128; got "
        f"{size[0]}x{size[1]}"
    )


def group_reason(call: calls.ColumnSparseAttention | calls.AttentionColumnSums) -> str:
    """As `cache_reason`, and the number of queries that share a list."""
    if (reason := cache_reason(call)) or call.group in (64, 128, 192):
        return reason
    return f"the column kernels take query groups of 64, 128 or 192; got {call.group}"


def select_reason(call: calls.SelectColumns) -> str:
    """Any sums will do."""
    return device_reason(call.device)


def norm_reason(call: calls.ResidualNorm) -> str:
    """Device, dtype and width of the residual stream."""
    width = call.x.shape[-1]
    if reason := device_reason(call.device):
        return reason
    if call.x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused norm takes a bfloat16 or float32 residual stream; got {call.x.dtype}"
    if width % 128 or width > 4096:
        return f"the fused norm takes widths up to 4096 in steps of 128; got {width}"
    if call.dtype in LARGEST and width % 512:
        return f"the fused norm gives 8 bits for widths in steps of 512; got {width}"
    return ""


def rotary_reason(call: calls.RotaryToCache) -> str:
    """Device, dtypes, heads, and angles that rows do not share."""
    heads, head_dim = call.qkv.shape[3:]
    if reason := device_reason(call.device) or rotary_operands_reason(call):
        return reason
    if head_dim not in (64, 128) or heads * head_dim % 128:
        return f"the fused rotary takes head dims 64 and 128; got {heads} heads of {head_dim}"
    if call.cos.ndim == 3:
        return "the fused rotary takes angles that all rows share; got some for every row"
    return ""


def quantise_reason(call: calls.Quantise) -> str:
    """Device, dtype and width of the rows."""
    width = call.x.shape[-1]
    if reason := device_reason(call.device):
        return reason
    if call.x.dtype not in (*HALVES, jnp.float32):
        return f"it takes bfloat16, float16 or float32; got {call.x.dtype}"
    if width % 512 or width > 4096:
        return f"it takes widths up to 4096 in steps of 512; got {width}"
    return ""


def matmul_reason(call: calls.QuantisedMatmul) -> str:
    """Device, and sizes that its copies and tiles take."""
    outputs, inputs = call.weight.shape
    if reason := device_reason(call.device):
        return reason
    if inputs % 128 or outputs % 128:
        return f"the 8-bit product takes sizes in steps of 128; got {inputs} x {outputs}"
    if call.dtype == jnp.float32:
        return "the 8-bit product gives 16 or 8 bits; got float32"
    return ""


def weight_reason(call: calls.WeightMatmul) -> str:
    """Device, dtypes, and sizes that its copies and tiles take."""
    outputs, inputs = call.weight.shape
    if reason := device_reason(call.device):
        return reason
    if call.x.dtype != jnp.bfloat16:
        return f"Hopper's product with 8-bit weights takes bfloat16; got {call.x.dtype}"
    if inputs % 128 or outputs % 128:
        return f"it takes inputs and outputs in steps of 128; got {inputs} and {outputs}"
    return ""


def weight_unasked(call: calls.WeightMatmul) -> str:
    """Where it serves only on request: of many rows every tile would widen the weights again."""
    rows = call.x.shape[0] * call.x.shape[1]
    if rows > 512:
        return f"the product of {rows} rows is left to other kernels unless asked for"
    return ""


def cross_reason(call: calls.CrossAttention) -> str:
    """Device, dtypes, and the size of the text."""
    return device_reason(call.device) or _text_reason(call.q.dtype, call.k, call.v)


def text_reason(call: calls.TextMemory) -> str:
    """As `cross_reason`, for a text that queries of its dtype will read."""
    return device_reason(call.device) or _text_reason(call.k.dtype, call.k, call.v)


def _text_reason(dtype: jnp.dtype, k: Float[Array, "R H M D"], v: Float[Array, "R H M D"]) -> str:
    keys, head_dim = k.shape[2:]
    if dtype not in HALVES or not dtype == k.dtype == v.dtype:
        return f"fused cross attention takes one 16-bit dtype; got {dtype} and {k.dtype}"
    if head_dim not in (64, 128) or keys > 128:
        return (
            "fused cross attention takes up to 128 keys and head dims 64 and 128; got "
            f"{keys} keys of {head_dim}"
        )
    return ""
