"""What a benchmark of kernels writes down, and how it takes the time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax


@dataclass(frozen=True)
class Row:
    """One line of the results; times in milliseconds a call, errors against float32 or better.

    tflops_kept: of the multiply-adds that the mask keeps. relative_error: Frobenius, of which
    `tolerance` is accepted.
    """

    case: str
    implementation: str
    implementation_used: str
    batch_rows: int
    dtype: str
    median_ms: float
    spread_ms: float
    density: float
    tflops_kept: float
    max_error: float
    relative_error: float
    tolerance: float


def measure(call: Callable[[], Any], calls: int, batches: int) -> tuple[float, float, Any]:
    """Median and spread over batches of back-to-back calls, waiting once a batch."""
    for _ in range(3):
        out = jax.block_until_ready(call())
    times = []
    for _ in range(batches):
        start = time.perf_counter()
        for _ in range(calls):
            out = call()
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times), max(times) - min(times), out
