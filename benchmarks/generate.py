"""Seconds and memory of whole generations, from text features to uint8 pictures on the host.

    python -m benchmarks.generate latency --budget-seconds 200
    python -m benchmarks.generate classes --models var_d30 --batches 1 8

Suites are listed in `benchmarks/generate_suites.py`; options replace what a suite says. Every row
is in `generate-SUITE.json` as soon as it is measured, with its commit. Rows of earlier runs on the
same device, with the same versions and XLA flags, stay in the file until they are measured again.

The last scale of a checked row is computed again from the same state without any kernel of ours.
Groups that do not fit into the rest of the budget are left out, and said to be.
"""

from __future__ import annotations

import argparse
import math
import sys
from typing import get_args

from benchmarks import _record as record
from benchmarks._options import add_out, parser_of
from benchmarks.generate_run import Options, Row, run
from benchmarks.generate_suites import SUITES, Text
from pallas_kernels import backends
from sparvar_jax.cli import console
from sparvar_jax.plans.caches import CACHES

KEY = (
    "model", "plan", "batch", "size", "text", "dtype", "fused", "matrices", "stream", "path",
    "cache",
)  # fmt: skip
TRACED_KERNELS = 30


def line(row: Row) -> str:
    """One row in one line of text."""
    head = f"{row['model']} x{row['batch']} {row['size'] or ''} {row['text']} {row['plan']}"
    head += "".join(
        f" {name} {row[name]}" for name in ("matrices", "stream", "cache") if name in row
    )
    if "failed" in row:
        return f"{head}: {row['failed']}"
    if row.get("check"):
        checked = row["check"]
        return f"{head}: check " + ", ".join(f"{k} {v}" for k, v in checked.items())
    parts = ", ".join(f"{k} {v:.4f}" for k, v in row["seconds_by_part"].items())
    cold = f"{row['cold_seconds']:.1f}" if row["cold_seconds"] else "-"
    peak = f"{row['peak_gib']:.2f}" if row["peak_gib"] else "-"
    return (
        f"{head}: {row['seconds_median']:.4f} s (spread {row['seconds_spread']:.4f}), "
        f"{row['images_per_second']:.2f} images/s; {parts}; {row['tflops']:.0f} TFLOP/s of "
        f"{row['matmul_ceiling_tflops']:.0f}; weights {row['weights_seconds']:.1f} s, compile "
        f"{row['compile_seconds']:.1f} s ({row['programs']} programs, {row['programs_from_cache']} "
        f"from cache), cold {cold}; peak {peak} GiB, planned {row['planned_gib']['peak']:.2f}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of(__doc__)
    parser.add_argument("suite", choices=SUITES)
    parser.add_argument("--models", nargs="+", help="released shapes or model directories")
    parser.add_argument("--plans", nargs="+")
    parser.add_argument("--batches", type=int, nargs="+")
    parser.add_argument("--sizes", nargs="+", help="0.25M is 512 px, 1M 1024, 2.25M 1536")
    parser.add_argument("--caches", nargs="+", choices=tuple(CACHES), help="key/value caches")
    parser.add_argument("--texts", nargs="+", choices=get_args(Text), help="features is fastest")
    parser.add_argument("--budget-seconds", type=float, default=math.inf)
    parser.add_argument("--repeats", type=int, default=Options.repeats)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument(
        "--fused", choices=("hopper", "portable", "xla"), help="the fused operations"
    )
    parser.add_argument("--matrices", choices=("dense", "int8", "fp8"), default="dense")
    parser.add_argument("--stream", choices=("float32", "bfloat16"), help="residual stream")
    parser.add_argument("--kernels", choices=backends.PATHS, help="the path, default: the best")
    parser.add_argument("--trace", action="store_true", help="also sum GPU time by kernel")
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, help="compare with XLA")
    add_out(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure one suite; exit 1 where something failed its check or was left out."""
    asked = parse(arguments)
    backends.use(asked.kernels or backends.path())
    console.use_compilation_cache()
    suite = SUITES[asked.suite].asked(
        asked.models, asked.plans, asked.batches, asked.sizes, asked.caches, asked.texts
    )
    check = suite.check if asked.check is None else asked.check
    how = asked.dtype, asked.fused, asked.matrices, asked.stream
    options = Options(asked.repeats, *how, asked.trace, check)

    def report(row: Row) -> None:
        record.add(f"generate-{asked.suite}", row, key=KEY, folder=asked.out)
        print(line(row), flush=True)
        for name, spent in list(row.get("kernel_ms", {}).items())[:TRACED_KERNELS]:
            print(f"  {spent['ms']:9.2f} ms  {spent['launches']:6d}x  {name[:100]}", flush=True)

    problems = run(suite.groups(), options, asked.budget_seconds, report)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
