"""Other attention implementations on the same operands, where they are installed."""

from __future__ import annotations

import importlib.util
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_cases
from benchmarks.kernel_cases import Case


def _swap(x: jax.Array) -> jax.Array:
    return jnp.swapaxes(x, 1, 2)


def _token_major(case: Case, rows: int) -> tuple[jax.Array, ...]:
    """q, k, v as [R, T, H, D] without the padding rows, copied before the clock starts."""
    q, k, v = kernel_cases.operands(case.shape, rows)
    keys = case.shape.keys
    return jax.jit(lambda q, k, v: (_swap(q), _swap(k[:, :, :keys]), _swap(v[:, :, :keys])))(
        q, k, v
    )


def fa3(case: Case, rows: int) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]] | None:
    """FlashAttention-3 through flash-attn3-jax (its wheel has head dim 128 only)."""
    if importlib.util.find_spec("flash_attn3_jax") is None or case.kind != "dense":
        return None
    if case.shape.head_dim != 128:
        return None
    from flash_attn3_jax import flash_mha

    return lambda q, k, v: flash_mha(q, k, v, softmax_scale=1.0), _token_major(case, rows)


def cudnn(case: Case, rows: int) -> tuple[Callable[..., jax.Array], tuple[jax.Array, ...]] | None:
    """cuDNN through JAX."""
    if jax.default_backend() != "gpu" or case.kind != "dense":
        return None

    def attend(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation="cudnn")

    return attend, _token_major(case, rows)


def _torch_operands(case: Case, rows: int) -> list[Any]:
    import torch

    q, k, v = kernel_cases.operands(case.shape, rows)
    keys = case.shape.keys
    return [torch.from_dlpack(q)] + [torch.from_dlpack(x)[:, :, :keys].contiguous() for x in (k, v)]


def fa2(case: Case, rows: int) -> Callable[[], Any] | None:
    """FlashAttention-2 through torch's scaled_dot_product_attention."""
    if importlib.util.find_spec("torch") is None or case.kind != "dense":
        return None
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if not torch.cuda.is_available():
        return None
    q, k, v = _torch_operands(case, rows)

    def attend():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1.0)

    return attend


def flex(case: Case, rows: int) -> Callable[[], Any] | None:
    """FlexAttention as SparVAR's authors call it: autotuned, blocks by a mask function."""
    if not _has_flex(case):
        return None
    import torch
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    q, k, v = _torch_operands(case, rows)
    queries, keys = case.shape.queries, case.shape.keys
    kept = torch.zeros((-(-queries // 128), -(-keys // 128)), dtype=torch.bool, device="cuda")
    table = kernel_cases.blocks(case)
    for tile, (row, count) in enumerate(zip(table.indices, table.counts, strict=True)):
        kept[tile, torch.from_numpy(np.array(row[:count], np.int64)).cuda()] = True

    def mask(batch, head, query, key):
        return kept[query // 128, key // 128]

    blocks = create_block_mask(
        mask, B=1, H=case.shape.heads, Q_LEN=queries, KV_LEN=keys, device="cuda", BLOCK_SIZE=128
    )
    compiled = torch.compile(flex_attention, dynamic=False, mode="max-autotune-no-cudagraphs")
    return lambda: compiled(q, k, v, block_mask=blocks, scale=1.0)


def flex_full(case: Case, rows: int) -> Callable[[], Any] | None:
    """FlexAttention told that all blocks are full: no mask function, no masked tail."""
    if not _has_flex(case):
        return None
    import torch
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    q, k, v = _torch_operands(case, rows)
    table = kernel_cases.blocks(case)
    tiles, wide = len(table.counts), -(-case.shape.keys // 128)
    order = np.zeros((1, 1, tiles, wide), np.int32)
    order[0, 0, :, : table.indices.shape[1]] = table.indices
    counts = torch.from_numpy(np.asarray(table.counts)[None, None]).cuda()
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts), torch.zeros_like(torch.from_numpy(order)).cuda(), counts,
        torch.from_numpy(order).cuda(), BLOCK_SIZE=128,
        seq_lengths=(case.shape.queries, case.shape.keys),
    )  # fmt: skip
    compiled = torch.compile(flex_attention)
    return lambda: compiled(q, k, v, block_mask=mask, scale=1.0)


def _has_flex(case: Case) -> bool:
    if importlib.util.find_spec("torch") is None or case.kind != "csla-blocks":
        return False
    import torch

    return torch.cuda.is_available()


TORCH = {"fa2": fa2, "flex": flex, "flex-full": flex_full}
"""Rivals that are timed by torch's events, by their name in the results."""


def time_torch(call: Callable[[], Any], calls: int, batches: int) -> tuple[float, float, Any]:
    """Median and spread in milliseconds by device events, and the last output."""
    import torch

    for _ in range(3):
        out = call()
    times = []
    for _ in range(batches):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(calls):
            out = call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / calls)
    return statistics.median(times), max(times) - min(times), out
