"""Tiles of the portable kernels, tried on the GPU that is here.

    python -m benchmarks.tune --cases csla-boxes columns-8

Times every candidate at the last scale of Infinity-8B, two rows, and prints the fastest one's line
for `pallas_kernels/portable/tuning.json`. Candidates whose output is wrong, or that do not fit a
multiprocessor, are named and left out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Callable, Iterator

from benchmarks import kernel_cases, kernels
from benchmarks._options import parser_of
from pallas_kernels import backends, shapes, support
from pallas_kernels.portable import tuning
from pallas_kernels.portable.tuning import Launch, TileConfig

OPS = {
    "dense": ("dense", 128),
    "csla-blocks": ("blocks", 128),
    "csla-boxes": ("windows", 128),
    "columns-8": ("columns", kernel_cases.GROUP),
    "columns-1": ("columns", kernel_cases.GROUP),
}
"""Kind of case -> how `tuning.json` names it, and the queries that share a list."""
SHAPE = shapes.SHAPES["8b/scale12"]
SIZES = ((128, 128, 8), (128, 64, 8), (128, 64, 4), (128, 32, 8), (64, 64, 4), (64, 32, 4))


def candidates(group: int) -> list[TileConfig]:
    """Queries, keys and warps of a program with 2 to 4 stages, for lists of `group` queries."""
    return [
        TileConfig(block_q=block_q, block_k=block_k, warps=warps, stages=stages)
        for block_q, block_k, warps in SIZES
        for stages in (2, 3, 4)
        if group % block_q == 0
    ]


@contextlib.contextmanager
def trial(name: str) -> Iterator[Callable[[Launch], None]]:
    """Takes tiles of that name into this GPU family's table, which is as before at the end."""
    table = tuning.measured(tuning.family(support.device_of().capability))
    before = table.get(name)
    try:
        yield lambda tiles: table.update({name: dataclasses.asdict(tiles)})
    finally:
        table.pop(name, None) if before is None else table.update({name: before})


def times(kind: str, calls: int, batches: int) -> dict[TileConfig, float]:
    """Milliseconds of every candidate that runs and is right."""
    op, group = OPS[kind]
    found: dict[TileConfig, float] = {}
    with trial(tuning.key(op, SHAPE.head_dim, True, group)) as take:
        for config in candidates(group):
            take(config)
            try:
                row = kernels.run_ours(kernel_cases.Case(SHAPE, kind), 2, calls, batches)
            except Exception as error:  # no room, or whatever a compiler raises
                print(f"{kind} {config}: {type(error).__name__}: {error}".partition("\n")[0])
                continue
            served = row.implementation_used == "portable"
            right = served and row.relative_error <= row.tolerance
            verdict = "" if right else ", wrong"
            print(f"{kind} {config}: {row.median_ms:.4f} ms{verdict}", flush=True)
            if right:
                found[config] = row.median_ms
    return found


def main() -> int:
    """Try the cases asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--calls", type=int, default=20, help="calls a batch")
    parser.add_argument("--batches", type=int, default=3)
    asked = parser.parse_args()
    backends.use("portable")
    missing = 0
    for kind in asked.cases:
        found = times(kind, asked.calls, asked.batches)
        if not found:
            print(f"{kind}: nothing ran on {support.device_of().kind or 'cpu'}", file=sys.stderr)
            missing = 1
            continue
        best = min(found, key=lambda config: found[config])
        op, group = OPS[kind]
        name = tuning.key(op, SHAPE.head_dim, True, group)
        print(f'"{name}": {json.dumps(dataclasses.asdict(best))}  # {found[best]:.4f} ms')
    return missing


if __name__ == "__main__":
    sys.exit(main())
