"""The backend "xla": it serves every call."""

from __future__ import annotations

from typing import Any

from pallas_kernels import calls
from pallas_kernels.backends import Backend, nothing
from pallas_kernels.selection import select_top
from pallas_kernels.xla import attention, fused, quantised

NAME = "xla"


def _attention(call: calls.Attention) -> Any:
    out, lse = attention.attention(
        call.q, call.k, call.v, call.kv_length, gaps=call.gaps, scale=call.scale
    )
    return (out, lse) if call.return_lse else out


def _block_sparse_attention(call: calls.BlockSparseAttention) -> Any:
    out, lse = attention.block_sparse_attention(
        call.q, call.k, call.v, call.blocks, scale=call.scale
    )
    return (out, lse) if call.return_lse else out


def _window_attention(call: calls.WindowAttention) -> Any:
    return attention.window_attention(
        call.q, call.k, call.v, call.geometry, call.windows, call.sinks, exact=call.exact,
        scale=call.scale,
    )  # fmt: skip


def _attention_column_sums(call: calls.AttentionColumnSums) -> Any:
    return attention.column_sums(
        call.q, call.k, call.lse, call.kv_length, call.group, gaps=call.gaps, scale=call.scale
    )


def _column_sparse_attention(call: calls.ColumnSparseAttention) -> Any:
    return attention.column_sparse_attention(
        call.q, call.k, call.v, call.columns, call.counts, kv_length=call.kv_length,
        group=call.group, granularity=call.granularity, gaps=call.gaps, scale=call.scale,
    )  # fmt: skip


def _select_columns(call: calls.SelectColumns) -> Any:
    return select_top(call.sums, call.count, call.granularity)


def _residual_norm(call: calls.ResidualNorm) -> Any:
    return fused.residual_norm(
        call.x, call.branch, call.vectors, one_plus=call.one_plus, dtype=call.dtype
    )


def _rotary_to_cache(call: calls.RotaryToCache) -> Any:
    return fused.rotary_to_cache(
        call.qkv, call.q_bias, call.v_bias, call.log_temperature, call.cos, call.sin, call.k_cache,
        call.v_cache, call.place, call.max_log_temperature,
    )  # fmt: skip


def _text_memory(call: calls.TextMemory) -> Any:
    return call.k, call.v, call.offsets


def _cross_attention(call: calls.CrossAttention) -> Any:
    return fused.cross_attention(call.q, call.k, call.v, call.offsets, call.scale)


def _quantise(call: calls.Quantise) -> Any:
    return quantised.quantise(call.x, call.dtype, call.x.shape[-1])


def _quantised_matmul(call: calls.QuantisedMatmul) -> Any:
    return quantised.quantised_matmul(
        call.values, call.scale, call.weight, call.weight_scale, call.bias, gelu=call.gelu,
        dtype=call.dtype,
    )  # fmt: skip


def _weight_matmul(call: calls.WeightMatmul) -> Any:
    return quantised.weight_matmul(
        call.x, call.weight, call.weight_scale, call.bias, gelu=call.gelu, dtype=call.dtype
    )


SERVED = {
    "attention": Backend(NAME, nothing, _attention),
    "block_sparse_attention": Backend(NAME, nothing, _block_sparse_attention),
    "window_attention": Backend(NAME, nothing, _window_attention),
    "attention_column_sums": Backend(NAME, nothing, _attention_column_sums),
    "column_sparse_attention": Backend(NAME, nothing, _column_sparse_attention),
    "select_columns": Backend(NAME, nothing, _select_columns),
    "residual_norm": Backend(NAME, nothing, _residual_norm),
    "rotary_to_cache": Backend(NAME, nothing, _rotary_to_cache),
    "text_memory": Backend(NAME, nothing, _text_memory),
    "cross_attention": Backend(NAME, nothing, _cross_attention),
    "quantise": Backend(NAME, nothing, _quantise),
    "quantised_matmul": Backend(NAME, nothing, _quantised_matmul),
    "weight_matmul": Backend(NAME, nothing, _weight_matmul),
}
"""The backend of every operation."""
