"""Our kernels beside the best others, on the shapes of real models, checked in the same run.

    python -m benchmarks.kernels --cases '8b/scale12/*' --rows 2
    python -m benchmarks.kernels --cases '*/scale*/[qpf]*' --rows 2 --name kernels-products

The second times the products of a block: qkv, proj, fc1 and fc2 (`benchmarks/kernel_products.py`).

Writes benchmarks/results/<device>/kernels.json. Every row's output is compared with float32
attention on its first and last (row, head), or with float64 products of sampled rows. The run is
void when FlashAttention-3 is slower than it should be at the reference shape: then something else
was using the machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax
import numpy as np

import pallas_kernels as pk
from benchmarks import _record as record
from benchmarks import kernel_cases, kernel_products, kernel_rivals
from benchmarks.kernel_cases import Case
from benchmarks.kernel_products import Product
from benchmarks.kernel_rows import Row, measure
from pallas_kernels import backends

Named = TypeVar("Named", Case, Product)
REFERENCE_CASE, REFERENCE_ROWS, SLOWEST_FA3_MS = "8b/scale12/dense", 2, 2.1
OPS = {
    "dense": "attention",
    "csla-blocks": "block_sparse_attention",
    "blocks-64": "block_sparse_attention",
    "csla-boxes": "window_attention",
    "decision": "attention_column_sums",
    "columns-8": "column_sparse_attention",
    "columns-1": "column_sparse_attention",
}
# Plain bfloat16 attention is off by 2.3e-3 in this norm; at most twice that is accepted.
TOLERANCE = 4.6e-3


def errors(case: Case, rows: int, pick: Callable[[tuple[slice, slice]], np.ndarray]):
    """Largest absolute and relative Frobenius error over the sampled (row, head) pairs."""
    largest, relative = 0.0, 0.0
    for place, want in kernel_cases.sampled_truth(case, rows):
        difference = np.asarray(pick(place), np.float32) - want
        largest = max(largest, float(np.abs(difference).max()))
        relative = max(relative, float(np.linalg.norm(difference) / np.linalg.norm(want)))
    return largest, relative


def make_row(case: Case, name: str, used: str, rows: int, timing, error) -> Row:
    """Fill in what follows from the time."""
    median, spread = timing
    share = kernel_cases.kept_share(case, rows)
    flops = case.shape.flops(rows, share)
    return Row(
        case.name, name, used, rows, "bfloat16", round(median, 4), round(spread, 4),
        round(share, 5), round(flops / median / 1e9, 1), error[0], error[1], TOLERANCE,
    )  # fmt: skip


def _token_major(out: Any) -> Any:
    """An output [R, H, T, D], or the first of several, as [R, T, H, D]."""
    return (out[0].swapaxes(1, 2), *out[1:]) if isinstance(out, tuple) else out.swapaxes(1, 2)


def run_ours(case: Case, rows: int, calls: int, batches: int) -> Row:
    """The library's own kernel (or what it falls back to).

    Like every rival it is timed in the layout it writes, which is token-major and what the models
    read: there XLA drops the public operation's transpose.
    """
    q, k, v = kernel_cases.operands(case.shape, rows)
    function, extra = kernel_cases.ours(case, rows)
    compiled = jax.jit(lambda *operands: _token_major(function(*operands)))
    median, spread, out = measure(lambda: compiled(q, k, v, *extra), calls, batches)
    table = kernel_cases.blocks(case) if "blocks" in case.kind else None
    used = pk.implementation_used(OPS[case.kind], q, k, v, blocks=table)
    out = (out[0] if isinstance(out, tuple) else out).swapaxes(1, 2)
    error = errors(case, rows, lambda place: np.asarray(out[place]))
    return make_row(case, "ours" if used == "hopper" else used, used, rows, (median, spread), error)


def run_rivals(case: Case, rows: int, calls: int, batches: int, names: list[str]) -> list[Row]:
    """Everything else that serves the case."""
    found = []
    for name in (name for name in ("fa3", "cudnn") if name in names):
        made = getattr(kernel_rivals, name)(case, rows)
        if made is None:
            continue
        compiled = jax.jit(made[0])
        median, spread, out = measure(lambda c=compiled, a=made[1]: c(*a), calls, batches)
        out = out.swapaxes(1, 2)
        error = errors(case, rows, lambda place, out=out: np.asarray(out[place]))
        found.append(make_row(case, name, name, rows, (median, spread), error))
    for name in (name for name in kernel_rivals.TORCH if name in names):
        call = kernel_rivals.TORCH[name](case, rows)
        if call is None:
            continue
        median, spread, out = kernel_rivals.time_torch(call, calls, batches)
        error = errors(case, rows, lambda place, out=out: out[place].float().cpu().numpy())
        found.append(make_row(case, name, name, rows, (median, spread), error))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", default=["*"], help="shell patterns of case names")
    parser.add_argument("--rows", nargs="+", type=int, default=[REFERENCE_ROWS])
    parser.add_argument("--rivals", nargs="*", default=["fa3", "cudnn", *kernel_rivals.TORCH])
    parser.add_argument(
        "--flex", default="8b/scale12/*", help="cases FlexAttention runs (it compiles slowly)"
    )
    parser.add_argument("--kernels", choices=backends.PATHS, help="the path, default: the best")
    parser.add_argument("--calls", type=int, default=20, help="calls a batch")
    parser.add_argument("--batches", type=int, default=7)
    parser.add_argument("--name", default="kernels", help="name of the results file")
    parser.add_argument("--folder", help="where to write instead of benchmarks/results/<device>")
    arguments = parser.parse_args()
    backends.use(arguments.kernels or backends.path())
    # torch needs memory as well: FlexAttention's table of SparVAR's mask takes 18 GiB to make.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    rows: list[Row] = []

    def report(new: Iterable[Row]) -> None:
        for row in new:
            rows.append(row)
            print(
                f"{row.case:24} {row.implementation:9} rows {row.batch_rows} "
                f"{row.median_ms:8.4f} ms +-{row.spread_ms:.3f} {row.tflops_kept:7.1f} TFLOP/s "
                f"error {row.relative_error:.1e}",
                flush=True,
            )
            record.write(
                arguments.name, [dataclasses.asdict(row) for row in rows], folder=arguments.folder
            )

    many = arguments.calls, arguments.batches
    for case in chosen(kernel_cases.all_cases(), arguments.cases):
        rivals = list(arguments.rivals)
        if not fnmatch.fnmatch(case.name, arguments.flex):
            rivals = [name for name in rivals if not name.startswith("flex")]
        for batch_rows in arguments.rows:
            report([run_ours(case, batch_rows, *many)])
            report(run_rivals(case, batch_rows, *many, rivals))
    if products := chosen(kernel_products.all_products(), arguments.cases):
        report(kernel_products.run(products, arguments.rows, *many))
    return verdict(rows)


def chosen(cases: list[Named], patterns: list[str]) -> list[Named]:
    """Cases in the order of the patterns, each once."""
    matches = [case for p in patterns for case in cases if fnmatch.fnmatch(case.name, p)]
    return list(dict.fromkeys(matches))


def verdict(rows: list[Row]) -> int:
    """0 when every output was right and the machine was quiet."""
    wrong = [row for row in rows if not row.relative_error <= row.tolerance]
    slow = [
        row for row in rows
        if (row.case, row.implementation, row.batch_rows) == (REFERENCE_CASE, "fa3", REFERENCE_ROWS)
        and row.median_ms > SLOWEST_FA3_MS
    ]  # fmt: skip
    for row in wrong:
        print(f"wrong: {row}", file=sys.stderr)
    for row in slow:
        print(f"void: FlashAttention-3 took {row.median_ms} ms", file=sys.stderr)
    return 1 if wrong or slow else 0


if __name__ == "__main__":
    sys.exit(main())
