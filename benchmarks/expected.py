"""What the portable kernels should take on GPUs that nobody here has: computed, not measured.

    python -m benchmarks.expected            # rewrite the table of docs/kernels.md
    python -m benchmarks.expected --check    # exit 1 if it is not what the files say

A time on an H100 times the larger of two ratios of published numbers: products and memory bandwidth
of the H100 over those of the GPU (`gpus.py`). So it supposes that a kernel gets the same share of
what limits it. Times are shown where benchmarks/results/h100/kernels-portable.json has them:

    python -m benchmarks.kernels --kernels portable --cases '8b/scale12/*' --name kernels-portable
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from benchmarks._options import parser_of
from benchmarks.gpus import GPUS, Gpu

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
MEASURED = ROOT / "benchmarks" / "results" / "h100" / "kernels-portable.json"
RUN_ON = "9.0"
CASES = ("dense", "csla-blocks", "csla-boxes", "columns-8")
_TABLE = re.compile(r"<!-- expected -->\n.*?<!-- end expected -->", re.DOTALL)


def factor(gpu: Gpu) -> float:
    """How many times as long as on the H100 a kernel should take."""
    run_on = GPUS[RUN_ON]
    return max(run_on.products / gpu.products, run_on.bandwidth / gpu.bandwidth)


def measured(file: Path = MEASURED) -> dict[str, float]:
    """Milliseconds of the portable kernels on the H100 at the last scale of 8B, by kind of case."""
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text())["rows"]
    return {
        kind: row["median_ms"]
        for kind in CASES
        for row in rows
        if row["case"] == f"8b/scale12/{kind}" and row["implementation_used"] == "portable"
    }


def table(times: dict[str, float]) -> str:
    """A line a GPU: what was done with it, the factor, and the times that follow."""
    titles = ["GPU", "compute capability", "kernels were", "times as long as an H100", *times]
    lines = [f"| {' | '.join(titles)} |", f"| {' | '.join('---' for _ in titles)} |"]
    for gpu in GPUS.values():
        done = "run" if gpu.family == RUN_ON else "assembled"
        share = factor(gpu)
        cells = [gpu.kind, gpu.family, done, f"{share:.2f}"]
        mark = "" if gpu.family == RUN_ON else "about "
        cells += [f"{mark}{ms * share:.2f} ms" for ms in times.values()]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def render(page: str, times: dict[str, float]) -> str:
    """The page with its table written anew; ValueError where it has none."""
    if not _TABLE.search(page):
        raise ValueError(f"{PAGE} has no table between <!-- expected --> and <!-- end expected -->")
    return _TABLE.sub(f"<!-- expected -->\n{table(times)}\n<!-- end expected -->", page)


def main() -> None:
    """Write or check the table."""
    parser = parser_of(__doc__)
    parser.add_argument("--check", action="store_true")
    asked = parser.parse_args()
    before = PAGE.read_text()
    after = render(before, measured())
    if asked.check and after != before:
        sys.exit(f"{PAGE} is older than its sources: run python -m benchmarks.expected")
    if not asked.check:
        PAGE.write_text(after)


if __name__ == "__main__":
    main()
