"""Fused element-wise operations: our kernels beside XLA, milliseconds and GB/s.

    python -m benchmarks.fused                      # the Hopper kernels
    python -m benchmarks.fused --kernels portable   # those in Triton

Both run on the same random inputs in one process, and their outputs must agree to bfloat16
accuracy. Calls are chained inside one compiled program, so that launches are not measured.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import pallas_kernels as pk
from benchmarks import _record as record
from benchmarks._options import add_out

SHAPES = {"2b": (16, 128), "8b": (28, 128)}  # heads, head dim
TOKENS = (16, 256, 1024, 4096)
ROWS, CACHED, TEXT, CHAIN = 2, 10624, 64, 16
# Outputs are rounded to bfloat16 (2^-9 relative) by both; one rounding apart is 2^-8.
TOLERANCE = 2**-8

Step = Callable[..., tuple[jax.Array, ...]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape. step: inputs to inputs of the next call, then further outputs."""

    name: str
    step: Callable[[str], Step]
    inputs: tuple[jax.Array, ...]
    bytes: int


def _random(seed: int, *shape: int, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def norm_case(model: str, tokens: int) -> Case:
    """Residual update and modulated norm: reads x and the branch, writes x and y."""
    width = int(np.prod(SHAPES[model]))
    table = 0.1 * _random(2, ROWS, 6, width, dtype=jnp.float32)
    bias = 0.1 * _random(3, width)

    def step(implementation: str) -> Step:
        return lambda x, y: pk.residual_norm(
            x, y, (table, 0), (table, 2), (table, 4), bias=bias, implementation=implementation
        )

    x = _random(0, ROWS, tokens, width, dtype=jnp.float32)
    inputs = (x, _random(1, ROWS, tokens, width))
    return Case(f"{model}/norm/{tokens}", step, inputs, 12 * x.size)


def rotary_case(model: str, tokens: int) -> Case:
    """Head split, norms, rotation and cache write: reads the joint product, writes q, k and v."""
    heads, head_dim = SHAPES[model]
    width, side = heads * head_dim, int(tokens**0.5)
    biases, angles = _random(1, 2, width), _random(3, tokens, head_dim // 2, dtype=jnp.float32)
    cos = jnp.repeat(jnp.cos(angles), 2, axis=1)
    sin = jnp.repeat(jnp.sin(angles), 2, axis=1) * jnp.where(jnp.arange(head_dim) % 2, 1, -1)
    place = {"start": CACHED - tokens, "width": side, "pitch": side}

    def step(implementation: str) -> Step:
        def call(qkv, k, v):
            q, k, v = pk.rotary_to_cache(
                qkv, biases[0], biases[1], jnp.zeros(heads), cos, sin,
                k, v, **place, implementation=implementation,
            )  # fmt: skip
            return qkv, k, v, q

        return call

    qkv = _random(0, ROWS, tokens, 3 * width)
    cache = _random(4, ROWS, heads, CACHED, head_dim)
    return Case(f"{model}/rotary/{tokens}", step, (qkv, cache, cache + 1), 4 * qkv.size)


def cross_case(model: str, tokens: int) -> Case:
    """Attention to a prompt's tokens: reads queries, writes outputs."""
    heads, head_dim = SHAPES[model]
    k, v = _random(1, 2, ROWS, heads, TEXT, head_dim)
    offsets = pk.text_offsets(jnp.arange(TEXT) < jnp.array([[24], [24]]), k)

    def step(implementation: str) -> Step:
        return lambda q: (pk.cross_attention(q, k, v, offsets, implementation=implementation),)

    q = _random(0, ROWS, tokens, heads * head_dim)
    return Case(f"{model}/cross/{tokens}", step, (q,), 4 * q.size)


def difference(case: Case, kernels: str) -> float:
    """Largest relative difference (Frobenius) between the outputs of both implementations."""
    outputs = [jax.jit(case.step(which))(*case.inputs) for which in (kernels, "xla")]
    pairs = [[np.asarray(x, np.float64) for x in pair] for pair in zip(*outputs, strict=True)]
    return max(float(np.linalg.norm(a - b) / np.linalg.norm(b)) for a, b in pairs)


def seconds(case: Case, implementation: str, repeats: int) -> list[float]:
    """Seconds a call, warm, from `repeats` chains; cache buffers are updated in place."""
    inner, count = jax.jit(case.step(implementation)), len(case.inputs)

    def chain(*values):
        for _ in range(CHAIN):
            values = lax.optimization_barrier(inner(*values))[:count]
        return values

    compiled = jax.jit(chain, donate_argnums=tuple(range(count)))
    values = jax.block_until_ready(compiled(*jax.tree.map(jnp.copy, case.inputs)))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        values = jax.block_until_ready(compiled(*values))
        times.append((time.perf_counter() - start) / CHAIN)
    return times


def rows_of(case: Case, repeats: int, kernels: str) -> list[dict[str, Any]]:
    """One row an implementation; RuntimeError where the two disagree."""
    error = difference(case, kernels)
    if not error <= TOLERANCE:
        raise RuntimeError(f"{case.name}: kernel and XLA differ by {error:.3g}")
    rows = []
    ours = "ours" if kernels == "hopper" else kernels
    for name, implementation in ((ours, kernels), ("xla", "xla")):
        times = seconds(case, implementation, repeats)
        median = float(np.median(times))
        row = {"case": case.name, "implementation": name, "batch_rows": ROWS, "error": error}
        row |= {"median_ms": 1e3 * median, "spread_ms": 1e3 * float(np.ptp(times))}
        rows.append(row | {"gb_per_s": case.bytes / median / 1e9})
        print(f"{case.name:16s} {name:8s} {1e3 * median:8.4f} ms {case.bytes / median / 1e9:6.0f}")
    return rows


def main() -> None:
    """Measure every operation at the shapes of Infinity-2B and 8B and write one JSON file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--kernels", choices=("hopper", "portable"), default="hopper")
    parser.add_argument("--name", default="fused", help="name of the results file")
    add_out(parser)
    arguments = parser.parse_args()
    rows = []
    for make in (norm_case, rotary_case, cross_case):
        for model in SHAPES:
            for tokens in TOKENS:
                rows += rows_of(make(model, tokens), arguments.repeats, arguments.kernels)
    record.write(arguments.name, rows, folder=arguments.out)


if __name__ == "__main__":
    main()
