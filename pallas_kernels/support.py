"""What each kernel can serve, as reasons: an empty string means supported."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.sparsity import BlockTable

_KERNEL_DTYPES = (jnp.bfloat16, jnp.float16)


@functools.cache
def device_reason() -> str:
    """Why the default device cannot run Mosaic kernels for Hopper."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"Mosaic kernels need a Hopper GPU; the default device is {device.platform}"
    capability = getattr(device, "compute_capability", "")
    if str(capability) != "9.0":
        return f"Mosaic kernels need compute capability 9.0; this device has {capability}"
    return mosaic_reason()


@functools.cache
def multiprocessors() -> int:
    """Streaming multiprocessors of the default device; an H100's where there is none (lowering)."""
    return int(getattr(jax.devices()[0], "core_count", 0) or 0) if not device_reason() else 132


@functools.cache
def mosaic_reason() -> str:
    """Why this jax cannot build the kernels."""
    version = tuple(int(part) for part in jax.__version__.split(".")[:2])
    if version < (0, 11):
        return f"Mosaic kernels need jax 0.11 or newer; this is {jax.__version__}"
    return ""


def operand_reason(
    q: Float[Array, "R2 H T D"], k: Float[Array, "R H S D"], v: Float[Array, "R H S D"]
) -> str:
    """Why the operands do not suit a kernel: dtype, head dim or cache rows."""
    if q.dtype not in _KERNEL_DTYPES:
        return f"kernels take bfloat16 or float16 queries; got {q.dtype}"
    if k.dtype != q.dtype or v.dtype != q.dtype:
        return f"kernels need one dtype for q, k and v; got {q.dtype}, {k.dtype}, {v.dtype}"
    if q.shape[-1] not in (64, 128):
        return f"kernels serve head dims 64 and 128; got {q.shape[-1]}"
    if k.shape[2] % 8:
        return f"kernels need a cache whose row count is a multiple of 8; got {k.shape[2]}"
    return ""


def block_reason(blocks: BlockTable, head_dim: int) -> str:
    """Why a block table does not suit the block-list kernel."""
    if blocks.block_q != 128 or blocks.block_k not in (64, 128):
        return (
            "the block-list kernel takes query blocks of 128 and key blocks of 64 or 128; got "
            f"{blocks.block_q}x{blocks.block_k}"
        )
    return ""


def group_reason(group: int) -> str:
    """Why a query group does not suit the column kernels."""
    if group not in (64, 128, 192):
        return f"the column kernels take query groups of 64, 128 or 192; got {group}"
    return ""


def cudnn_reason(q: Float[Array, "R2 H T D"]) -> str:
    """Why cuDNN's attention cannot serve."""
    device = jax.devices()[0]
    if device.platform not in ("gpu", "cuda"):
        return f"cuDNN needs a CUDA device; the default device is {device.platform}"
    if float(getattr(device, "compute_capability", "0") or 0) < 8.0:
        return "cuDNN attention needs compute capability 8.0 or newer"
    if q.dtype not in _KERNEL_DTYPES:
        return f"cuDNN attention takes 16-bit floats; got {q.dtype}"
    if q.shape[-1] % 8 or q.shape[-1] > 128:
        return f"cuDNN attention takes head dims up to 128 in steps of 8; got {q.shape[-1]}"
    return ""


def validate_operands(q: Array, k: Array, v: Array, kv_length: int) -> None:
    """Raise ValueError when q, k, v cannot belong together."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [R', H, T, D] and k, v one shape [R, H, S, D]. "
            f"Got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if q.shape[0] > k.shape[0] or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q may have fewer rows than the cache but needs its heads and head dim. "
            f"Got q {q.shape}, k {k.shape}."
        )
    if not 0 < kv_length <= k.shape[2]:
        raise ValueError(
            f"kv_length must lie in 1..{k.shape[2]}, the cache's rows. Got {kv_length}."
        )
