"""`python -m tests.fuzz --minutes 30`: try mutated input for a while, and print failures as tests.

Exit code 1 where something failed. `--out FILE` writes a summary as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from tests.fuzz import campaign


def main() -> int:
    """Run the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0, help="for how long")
    parser.add_argument("--cases", type=int, default=0, help="at most so many; 0: no limit")
    parser.add_argument("--seed", type=int, default=0, help="of the first round")
    parser.add_argument("--only", default="", help="targets, joined by commas")
    parser.add_argument("--out", type=Path, help="JSON file for the summary")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.child:
        campaign.child(sys.argv[1:])
        return 0
    from benchmarks import _record as record

    start, described = time.monotonic(), record.describe()  # of the code that runs, not of later
    totals = run(asked)
    summary = described | summarise(totals, asked, time.monotonic() - start)
    print(json.dumps(summary, indent=1))
    if asked.out:
        asked.out.write_text(json.dumps(summary, indent=1) + "\n")
    return 1 if summary["failures"] else 0


def run(asked: argparse.Namespace) -> dict[str, campaign.Counts]:
    """Round after round over all targets, until the time or the cases are used up."""
    from tests.fuzz.targets import TARGETS

    names = asked.only.split(",") if asked.only else list(TARGETS)
    totals = {name: campaign.Counts() for name in names}
    child, seed, ends = campaign.Child(), asked.seed, time.monotonic() + 60 * asked.minutes
    try:
        while time.monotonic() < ends:
            for name in names:
                left = ends - time.monotonic()
                done = sum(total.cases for total in totals.values())
                if left <= 0 or (asked.cases and done >= asked.cases):
                    return totals
                total = totals[name]
                known = {found.signature for found in total.found}
                # Targets differ in speed: a round is so long that each gets about as much time.
                round_ = child.try_target(name, 200, seed, known, min(left, 15.0))
                campaign.add(total, round_)
                for found in round_.found:
                    print(found.as_test(), flush=True)
            seed += 1
    finally:
        child.close()
    return totals


def summarise(
    totals: dict[str, campaign.Counts], asked: argparse.Namespace, seconds: float
) -> dict:
    """What was tried and found, as a result file has it."""
    from tests.fuzz import limits

    return {
        "command": "python -m tests.fuzz " + " ".join(sys.argv[1:]),
        "seed": asked.seed,
        "seconds": round(seconds, 1),
        "cases": sum(total.cases for total in totals.values()),
        "failures": sum(len(total.found) for total in totals.values()),
        "limits": {"mebibytes": limits.MEMORY >> 20, "processor_seconds": limits.SECONDS},
        "targets": {
            name: {
                "cases": total.cases,
                "read": total.read,
                "refused": total.refused,
                "failures": [f"{found.kind}: {found.signature}" for found in total.found],
                "largest_growth_mebibytes": round(total.largest / 2**20, 1),
                "slowest_processor_seconds": round(total.slowest, 2),
            }
            for name, total in totals.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
