"""What a compiled generation holds, computes and is served by; and what the device can do."""

from __future__ import annotations

import re
import time
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels
from benchmarks.generate_bench import Bench
from benchmarks.models import bytes_of
from sparvar_jax.models.cross_attention import FoldedText
from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.weights import checkpoint

GIB = 2**30
KEY = jax.dtypes.prng_key
OPS = {
    "dense": "attention",
    "cs4a decision": "attention_column_sums",
    "cs4a": "column_sparse_attention",
    "csla blocks 64": "block_sparse_attention",
    "csla blocks 128": "block_sparse_attention",
    "csla boxes": "window_attention",
}
"""Attention of a plan, by name -> the operation that computes it."""
NOT_PER_TOKEN = re.compile(r"\b(ada|cross\.kv)\b")
"""Products of a block that run once a generation, not once a token."""
FOLDED = re.compile(r"\bcross\.(q|proj)\b")
"""Products of a block that a folded text replaces."""


def implementations(bench: Bench, plan: Plan) -> dict[str, str]:
    """Which implementation serves every attention of a plan: "hopper", "cudnn" or "xla".

    Files recorded before that name call "hopper" "mosaic".
    """
    config, used = bench.parts.transformer.config, {}
    for index, step in enumerate(plan.steps):
        dtype = config.precision.compute
        for segment in step.segments:
            name = segment.attention.name
            place = plan.place(index, segment.layers[0])
            rows = bench.batch * step.cached_rows(segment)
            shape = (rows, config.heads, place.queries, config.head_dim)
            query = jax.ShapeDtypeStruct(shape, dtype)
            keys = jax.ShapeDtypeStruct((*shape[:2], place.rows.total, shape[3]), dtype)
            if name in OPS:
                used[name] = pallas_kernels.implementation_used(OPS[name], query, keys, keys)
    return used


def custom_calls(bench: Bench, plan: Plan) -> dict[str, int]:
    """Calls out of XLA in the last scale's program by target, read from the executable itself."""
    text = bench.programs(plan)[len(plan.steps) - 1].as_text()
    return dict(Counter(re.findall(r'custom_call_target="([^"]+)"', text)))


def memory(bench: Bench, plan: Plan) -> dict[str, float]:
    """GiB of the weights, of the cache, and at the peak, as the compiler lays out buffers.

    The peak is the largest program's inputs, outputs and temporaries beside the weights. It counts
    neither a text encoder, nor the CUDA context, nor code, nor what the allocator cannot use.
    """
    weights = bytes_of(bench.parts.transformer) + bytes_of(bench.parts.tokenizer)
    config = bench.parts.transformer.config
    rows = bench.batch * plan.row_factor
    *steps, decode = bench.programs(plan)
    shape = CacheShape(rows, config.heads, config.head_dim, config.precision.compute)
    cache = cache_bytes(plan, shape)
    peak = cache + tree_bytes(decode.args_info[0][1:]) + program_bytes(decode)  # no condition
    for program in steps:
        _, *rest = program.args_info[0]
        peak = max(peak, tree_bytes(rest) + program_bytes(program))
    shares = {"weights": weights, "cache": cache, "peak": weights + peak}
    return {name: value / GIB for name, value in shares.items()}


def tree_bytes(tree: Any) -> int:
    """Bytes of arrays or of their descriptions; random keys count nothing."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if not jnp.issubdtype(leaf.dtype, KEY)]
    return sum(int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize for leaf in leaves)


def program_bytes(program: Any) -> int:
    """Bytes a compiled program needs besides its inputs: temporaries, and outputs of their own."""
    stats = program.memory_analysis()
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.temp_size_in_bytes + outputs


def peak_bytes() -> int | None:
    """Peak bytes in use on the first device since this process started; None on a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    return stats["peak_bytes_in_use"] if stats else None


def transformer_tflop(bench: Bench, plan: Plan) -> float:
    """10^12 operations of the blocks in one generation: matrix products, and kept attention pairs.

    A multiplication with its addition counts two. Decision steps count their dense pass only.
    """
    config, per_token, total = bench.parts.transformer.config, _products_per_token(bench), 0.0
    for index, step in enumerate(plan.steps):
        for segment in step.segments:
            place = plan.place(index, segment.layers[0])
            products = 2 * per_token / config.depth * place.queries * step.multiplied_rows(segment)
            pairs = segment.attention.pairs(place) * step.cached_rows(segment)
            layers = segment.layers[1] - segment.layers[0]
            total += bench.batch * layers * (products + 4 * config.width * pairs)
    return total / 1e12


def _products_per_token(bench: Bench) -> int:
    """Multiplications a token in the matrix products of all blocks."""
    parts = jax.tree.leaves(
        bench.condition_shape(), is_leaf=lambda part: isinstance(part, FoldedText)
    )
    folded = [part for part in parts if isinstance(part, FoldedText)]
    products = sum((layer.keys.size + layer.values.size) // len(layer.keys) for layer in folded)
    for path, leaf in checkpoint.abstract_parameters(bench.parts.transformer).items():
        every_token = not NOT_PER_TOKEN.search(path) and not (folded and FOLDED.search(path))
        if path.startswith("blocks.") and path.endswith("kernel") and every_token:
            products += int(np.prod(leaf.shape))
    return products


def matmul_ceiling() -> float:
    """Measured bfloat16 TFLOP/s of a square product on random data: 8192^3, on a CPU 512^3."""
    side = 512 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (side, side), jnp.bfloat16)
    product = jax.jit(lambda x: x @ x)
    product(a).block_until_ready()
    before = time.perf_counter()
    out = a
    for _ in range(20):
        out = product(a)
    out.block_until_ready()
    return 20 * 2 * side**3 / (time.perf_counter() - before) / 1e12
