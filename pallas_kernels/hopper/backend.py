"""The backend "hopper": what its kernels serve, and how a call becomes a call of a kernel.

Kernels are imported when they are first called, because they need a jax that has Mosaic GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pallas_kernels import calls, operands
from pallas_kernels.backends import Backend, nothing
from pallas_kernels.hopper import reasons, tuning
from pallas_kernels.probing import lowering_reason
from pallas_kernels.selection import select_top
from pallas_kernels.sparsity import BlockTable, dense_blocks

NAME = "hopper"


def _backend(
    reason: Callable[[Any], str],
    run: Callable[[Any], Any],
    unasked: Callable[[Any], str] = nothing,
) -> Backend:
    def probe(call: calls.Call) -> str:
        return lowering_reason(run, call)

    return Backend(NAME, reason, run, unasked, nothing if reasons.jax_is_tested() else probe)


def _attention(call: calls.Attention) -> Any:
    head_dim, bounded = call.q.shape[-1], call.logit_bound is not None
    config = tuning.block_list_config("dense", head_dim, bounded, kind=call.device.kind)
    blocks = dense_blocks(
        call.q.shape[2],
        call.kv_length,
        block_q=config.block_q,
        block_k=config.block_k,
        gaps=call.gaps,
    )
    return _attend_blocks(call, blocks, config)


def _block_sparse_attention(call: calls.BlockSparseAttention) -> Any:
    head_dim, bounded = call.q.shape[-1], call.logit_bound is not None
    block_k = call.blocks.block_k
    config = tuning.block_list_config("blocks", head_dim, bounded, block_k, call.device.kind)
    return _attend_blocks(call, call.blocks, config)


def _attend_blocks(
    call: calls.Attention | calls.BlockSparseAttention,
    blocks: BlockTable,
    config: tuning.BlockListConfig,
) -> Any:
    from pallas_kernels.hopper import ops

    out, lse = ops.attend_blocks(
        call.q, call.k, call.v, blocks, config, scale=call.scale, logit_bound=call.logit_bound,
        hidden_finite=call.hidden_finite, ctas=call.device.multiprocessors,
    )  # fmt: skip
    return (out, lse) if call.return_lse else out


def _window_attention(call: calls.WindowAttention) -> Any:
    from pallas_kernels.hopper import ops

    head_dim, bounded = call.q.shape[-1], call.logit_bound is not None
    config = tuning.gather_config("windows", head_dim, bounded, kind=call.device.kind)
    return ops.attend_windows(
        call.q, call.k, call.v, call.geometry, call.windows, call.sinks, config, exact=call.exact,
        scale=call.scale, logit_bound=call.logit_bound, ctas=call.device.multiprocessors,
    )  # fmt: skip


def _attention_column_sums(call: calls.AttentionColumnSums) -> Any:
    from pallas_kernels.hopper import ops

    config = tuning.column_sums_config(call.q.shape[-1], call.device.kind)
    return ops.column_sums(
        call.q, call.k, call.lse, call.kv_length, call.group, config=config, gaps=call.gaps,
        scale=call.scale, ctas=call.device.multiprocessors,
    )  # fmt: skip


def _column_sparse_attention(call: calls.ColumnSparseAttention) -> Any:
    from pallas_kernels.hopper import ops

    head_dim, bounded = call.q.shape[-1], call.logit_bound is not None
    config = tuning.gather_config("columns", head_dim, bounded, call.group, call.device.kind)
    return ops.attend_columns(
        call.q, call.k, call.v, call.columns, call.counts, config, kv_length=call.kv_length,
        granularity=call.granularity, gaps=call.gaps, scale=call.scale,
        logit_bound=call.logit_bound, ctas=call.device.multiprocessors,
    )  # fmt: skip


def _select_columns(call: calls.SelectColumns) -> Any:
    from pallas_kernels.hopper import ops

    return select_top(call.sums, call.count, call.granularity, ops.row_thresholds)


def _residual_norm(call: calls.ResidualNorm) -> Any:
    from pallas_kernels.hopper import fused_norm

    return fused_norm.residual_norm(
        call.x,
        call.branch,
        call.vectors,
        one_plus=call.one_plus,
        dtype=call.dtype,
        config=fused_norm.norm_config(call.x.shape[-1]),
        multiprocessors=call.device.multiprocessors,
    )


def _rotary_to_cache(call: calls.RotaryToCache) -> Any:
    from pallas_kernels.hopper import fused_rotary

    return fused_rotary.rotary_to_cache(
        call.qkv, call.q_bias, call.v_bias, call.log_temperature, call.cos, call.sin, call.k_cache,
        call.v_cache, call.place, call.max_log_temperature, fused_rotary.RotaryConfig(),
        call.device.multiprocessors,
    )  # fmt: skip


def _text_memory(call: calls.TextMemory) -> Any:
    from pallas_kernels.hopper import fused_cross

    return fused_cross.pad_text(call.k, call.v, call.offsets)


def _cross_attention(call: calls.CrossAttention) -> Any:
    from pallas_kernels.hopper import fused_cross

    config, multiprocessors = fused_cross.CrossConfig(), call.device.multiprocessors
    return fused_cross.cross_attention(
        call.q, call.k, call.v, call.offsets, call.scale, config, multiprocessors
    )


def _quantise(call: calls.Quantise) -> Any:
    from pallas_kernels.hopper import fused_quantise

    batch, tokens, width = call.x.shape
    values, scale = fused_quantise.quantise(
        call.x.reshape(-1, width), dtype=call.dtype, multiprocessors=call.device.multiprocessors
    )
    return values.reshape(call.x.shape), scale.reshape(1, batch, tokens)


def _quantised_matmul(call: calls.QuantisedMatmul) -> Any:
    from pallas_kernels.hopper import quantised_matmul as kernel
    from pallas_kernels.hopper.product_tiles import matmul_config

    blocks, rows, tokens = call.scale.shape
    ctas = call.device.multiprocessors
    config = matmul_config(rows * tokens, len(call.weight_scale), call.dtype, ctas)
    out = kernel.quantised_matmul(
        call.values.reshape(rows * tokens, -1), call.scale.reshape(blocks, -1), call.weight,
        call.weight_scale, call.bias, gelu=call.gelu, dtype=call.dtype,
        config=config, ctas=ctas,
    )  # fmt: skip
    values = out[0].reshape(rows, tokens, -1)
    return values if len(out) == 1 else (values, out[1].reshape(-1, rows, tokens))


def _weight_matmul(call: calls.WeightMatmul) -> Any:
    from pallas_kernels.hopper import weight_matmul as kernel

    rows = call.x.reshape(-1, call.x.shape[-1])
    ctas = call.device.multiprocessors
    out = kernel.weight_matmul(
        rows, call.weight, call.weight_scale, call.bias, gelu=call.gelu, ctas=ctas
    )
    return out.reshape(*call.x.shape[:2], -1)


def served() -> dict[str, Backend]:
    """The backend of every operation."""
    return {
        "attention": _backend(reasons.cache_reason, _attention),
        "block_sparse_attention": _backend(reasons.blocks_reason, _block_sparse_attention),
        "window_attention": _backend(reasons.cache_reason, _window_attention),
        "attention_column_sums": _backend(reasons.group_reason, _attention_column_sums),
        "column_sparse_attention": _backend(reasons.group_reason, _column_sparse_attention),
        "select_columns": _backend(reasons.select_reason, _select_columns),
        "residual_norm": _backend(reasons.norm_reason, _residual_norm, operands.norm_unasked),
        "rotary_to_cache": _backend(reasons.rotary_reason, _rotary_to_cache),
        "text_memory": _backend(reasons.text_reason, _text_memory),
        "cross_attention": _backend(reasons.cross_reason, _cross_attention),
        "quantise": _backend(reasons.quantise_reason, _quantise),
        "quantised_matmul": _backend(reasons.matmul_reason, _quantised_matmul),
        "weight_matmul": _backend(reasons.weight_reason, _weight_matmul, reasons.weight_unasked),
    }


SERVED = served()
