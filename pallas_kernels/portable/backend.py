"""The backend "portable": what its kernels serve, and how a call becomes a call of a kernel.

Kernels are imported when they are first called, because they need a jax that has Pallas's Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels import calls, operands
from pallas_kernels.backends import Backend, nothing
from pallas_kernels.portable import reasons, tuning
from pallas_kernels.probing import lowering_reason

NAME = "portable"


def _backend(
    reason: Callable[[Any], str],
    run: Callable[[Any], Any],
    unasked: Callable[[Any], str] = nothing,
) -> Backend:
    def probe(call: calls.Call) -> str:
        return lowering_reason(run, call)

    return Backend(NAME, reason, run, unasked, nothing if reasons.jax_is_tested() else probe)


def _tiles(op: str, call: Any, group: int) -> tuning.TileConfig:
    bounded = call.logit_bound is not None
    return tuning.tiles(op, call.q.shape[-1], bounded, group, call.device.capability)


def _attention(call: calls.Attention) -> Any:
    from pallas_kernels.portable import ops

    return ops.attend(call, _tiles("dense", call, 128))


def _block_sparse_attention(call: calls.BlockSparseAttention) -> Any:
    from pallas_kernels.portable import ops

    config = tuning.dividing(_tiles("blocks", call, 128), call.blocks.block_q, call.blocks.block_k)
    return ops.attend_blocks(call, call.blocks, config)


def _window_attention(call: calls.WindowAttention) -> Any:
    from pallas_kernels.portable import ops

    op = "windows-exact" if call.exact else "windows"
    return ops.attend_windows(call, _tiles(op, call, 128))


def _attention_column_sums(call: calls.AttentionColumnSums) -> Any:
    from pallas_kernels.portable import ops

    return ops.column_sums(call, tuning.column_sums(call.q.shape[-1], call.device.capability))


def _column_sparse_attention(call: calls.ColumnSparseAttention) -> Any:
    from pallas_kernels.portable import ops

    return ops.attend_columns(call, _tiles("columns", call, call.group))


def _select_columns(call: calls.SelectColumns) -> Any:
    from pallas_kernels.portable import ops

    return ops.select_columns(call)


def _residual_norm(call: calls.ResidualNorm) -> Any:
    from pallas_kernels.portable import fused

    return fused.residual_norm(call)


def _rotary_to_cache(call: calls.RotaryToCache) -> Any:
    from pallas_kernels.portable import fused

    return fused.rotary_to_cache(call)


def _cross_attention(call: calls.CrossAttention) -> Any:
    from pallas_kernels.portable import fused

    return fused.cross_attention(call)


def _weight_matmul(call: calls.WeightMatmul) -> Any:
    from pallas_kernels.portable import products

    return products.weight_matmul(call)


SERVED = {
    "attention": _backend(reasons.cache_reason, _attention),
    "block_sparse_attention": _backend(reasons.blocks_reason, _block_sparse_attention),
    "window_attention": _backend(reasons.cache_reason, _window_attention),
    "attention_column_sums": _backend(reasons.group_reason, _attention_column_sums),
    "column_sparse_attention": _backend(reasons.group_reason, _column_sparse_attention),
    "select_columns": _backend(reasons.select_reason, _select_columns),
    "residual_norm": _backend(reasons.norm_reason, _residual_norm, operands.norm_unasked),
    "rotary_to_cache": _backend(reasons.rotary_reason, _rotary_to_cache),
    "cross_attention": _backend(reasons.cross_reason, _cross_attention),
    "weight_matmul": _backend(reasons.weight_reason, _weight_matmul, reasons.weight_unasked),
}
"""The backend of every operation that it has."""
