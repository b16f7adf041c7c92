"""Seconds to the first picture of a fresh process: once with an empty compile cache, once with it.

    python -m benchmarks.cold_start --model infinity_8b

Starts two processes one after the other with a new compile cache. Each makes the weights, compiles
(or finds) every program in parallel threads, and draws one picture. Rows go to
`generate-cold.json`.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from typing import Any

from benchmarks._options import add_out, parser_of

KEY = ("model", "plan", "batch", "cache")


def one_process(
    model: str, plan_name: str, batch: int, dtype: str | None, cache: str
) -> dict[str, Any]:
    """One row: how long importing, weights, compiling and the first picture took.

    cache: folder of compiled programs. Modules that take long to import are imported here.
    """
    start = time.perf_counter()
    import jax

    from benchmarks import models
    from benchmarks.generate_bench import Bench
    from sparvar_jax.cli import console

    jax.config.update("jax_compilation_cache_dir", cache)
    console.use_compilation_cache()
    jax.devices()
    imported = time.perf_counter()
    parts = models.build(model, dtype=dtype)
    loaded = time.perf_counter()
    before = console.count_programs()
    bench = Bench(parts, batch)
    plan = bench.plan(plan_name)
    bench.compile([plan])
    compiled = time.perf_counter()
    picture = bench.draw(plan)
    drawn = time.perf_counter()
    if picture.std() < 1:
        raise RuntimeError(f"{plan.name}: the picture is flat: the generation did not run")
    asked, found = (now - then for now, then in zip(console.count_programs(), before, strict=True))
    return {
        "model": parts.name,
        "plan": plan.name,
        "batch": batch,
        "cache": "filled" if found else "empty",
        "import_seconds": imported - start,
        "weights": parts.weights,
        "weights_seconds": loaded - imported,
        "compile_seconds": compiled - loaded,
        "first_picture_seconds": drawn - loaded,
        "programs": asked,
        "programs_from_cache": found,
    }


def two_processes(arguments: list[str]) -> None:
    """This command twice, with a compile cache that is empty at first; raises if one fails."""
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "benchmarks.cold_start", *arguments, "--cache", cache]
        for _ in range(2):
            subprocess.run(command, check=True)


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the rows."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="infinity_8b", help="released shape or directory")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--cache", help="measure this process alone, with this compile cache")
    add_out(parser)
    asked = parser.parse_args(arguments)
    if asked.cache is None:
        two_processes(arguments)
        return
    row = one_process(asked.model, asked.plan, asked.batch, asked.dtype, asked.cache)
    from benchmarks import _record as record

    record.add("generate-cold", row, key=KEY, folder=asked.out)
    print(", ".join(f"{k} {v:.1f}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))


if __name__ == "__main__":
    main()
