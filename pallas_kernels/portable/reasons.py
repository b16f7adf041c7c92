"""What the Triton kernels cannot serve, as reasons: an empty string means that they can."""

from __future__ import annotations

import importlib.util

import jax
import jax.numpy as jnp

from pallas_kernels import calls
from pallas_kernels.operands import HALVES, operands_reason, rotary_operands_reason
from pallas_kernels.support import Device
from pallas_kernels.xla.quantised import LARGEST

# The tests lower every kernel with these releases; jax has announced that Triton will leave it.
_FIRST, _LAST_TESTED = (0, 10), (0, 12)


def jax_reason() -> str:
    """Why this jax cannot build the kernels."""
    if importlib.util.find_spec("jax.experimental.pallas.triton") is None:
        return f"Triton kernels need a jax with Pallas's Triton; {jax.__version__} has none"
    if jax.__version_info__[:2] < _FIRST:
        return f"Triton kernels need jax 0.10 or newer; this is {jax.__version__}"
    return ""


def jax_is_tested() -> bool:
    """Whether the tests lower every kernel with this release of jax."""
    return _FIRST <= jax.__version_info__[:2] <= _LAST_TESTED


def device_reason(device: Device) -> str:
    """Why a device cannot run the kernels."""
    if not device.is_cuda:
        return f"Triton kernels need an NVIDIA GPU; the call's device is {device.platform}"
    if (device.capability or (0, 0)) < (8, 0):
        major, minor = device.capability or (0, 0)
        return f"Triton kernels need compute capability 8.0; the call's device has {major}.{minor}"
    return jax_reason()


def cache_reason(call: calls.CacheCall) -> str:
    """Device, dtypes and head dim of an attention call."""
    if reason := device_reason(call.device) or operands_reason(call):
        return reason
    rows, heads = call.q.shape[:2]
    if rows * heads > _MOST_PROGRAMS:
        return f"kernels take up to {_MOST_PROGRAMS} rows times heads; got {(rows, heads)}"
    return ""


_MOST_PROGRAMS = 65535  # the second axis of a CUDA grid


def blocks_reason(call: calls.BlockSparseAttention) -> str:
    """As `cache_reason`, and block sizes."""
    size = (call.blocks.block_q, call.blocks.block_k)
    if (reason := cache_reason(call)) or all(side % 64 == 0 for side in size):
        return reason
    return f"the block-list kernel takes blocks in steps of 64; got {size[0]}x{size[1]}"


def group_reason(call: calls.ColumnSparseAttention | calls.AttentionColumnSums) -> str:
    """As `cache_reason`, and the number of queries that share a list."""
    if (reason := cache_reason(call)) or call.group % 64 == 0:
        return reason
    return f"the column kernels take query groups in steps of 64; got {call.group}"


def select_reason(call: calls.SelectColumns) -> str:
    """Any sums whose rows fit the registers of a program."""
    width = call.sums.shape[-1]
    if reason := device_reason(call.device):
        return reason
    if width > _WIDEST:
        return f"the selection kernel takes rows of up to {_WIDEST} columns; got {width}"
    return ""


_WIDEST = 32768


def norm_reason(call: calls.ResidualNorm) -> str:
    """Device, dtypes and width of the residual stream."""
    width = call.x.shape[-1]
    if reason := device_reason(call.device):
        return reason
    if call.x.dtype not in (jnp.float32, jnp.bfloat16):
        return f"the fused norm takes a bfloat16 or float32 residual stream; got {call.x.dtype}"
    if width > _WIDEST_NORM:
        return f"the fused norm takes widths up to {_WIDEST_NORM}; got {width}"
    if call.dtype in LARGEST:
        return f"the fused norm gives 16 or 32 bits; got {call.dtype}"
    return ""


_WIDEST_NORM = 8192


def rotary_reason(call: calls.RotaryToCache) -> str:
    """Device, dtypes and head dim."""
    head_dim = call.qkv.shape[4]
    if reason := device_reason(call.device) or rotary_operands_reason(call):
        return reason
    if head_dim not in (64, 128):
        return f"the fused rotary takes head dims 64 and 128; got {head_dim}"
    return ""


def cross_reason(call: calls.CrossAttention) -> str:
    """Device, dtypes, and the size of the text."""
    keys, head_dim = call.k.shape[2:]
    if reason := device_reason(call.device):
        return reason
    if call.q.dtype not in HALVES or not call.q.dtype == call.k.dtype == call.v.dtype:
        return f"fused cross attention takes one 16-bit dtype; got {call.q.dtype}, {call.k.dtype}"
    if head_dim not in (64, 128) or keys > 128:
        return (
            "fused cross attention takes up to 128 keys and head dims 64 and 128; got "
            f"{keys} keys of {head_dim}"
        )
    return ""


def weight_reason(call: calls.WeightMatmul) -> str:
    """Device and dtypes; e4m3 came to tensor cores, and to Triton, with capability 8.9."""
    if reason := device_reason(call.device):
        return reason
    if call.x.dtype not in HALVES:
        return f"products with 8-bit weights take 16-bit activations; got {call.x.dtype}"
    capability = call.device.capability
    if call.weight.dtype != jnp.int8 and capability is not None and capability < (8, 9):
        return f"weights of {call.weight.dtype} need compute capability 8.9"
    return ""


def weight_unasked(call: calls.WeightMatmul) -> str:
    """Many rows."""
    rows = call.x.shape[0] * call.x.shape[1]
    if rows > _MOST_ROWS:
        return f"products of more than {_MOST_ROWS} rows are left to the compiler; got {rows}"
    return ""


_MOST_ROWS = 2048
