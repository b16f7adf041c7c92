"""What the Triton kernels cannot serve, as reasons: an empty string means that they can."""

from __future__ import annotations

import importlib.util

import jax

from pallas_kernels import calls
from pallas_kernels.operands import operands_reason
from pallas_kernels.support import Device

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
