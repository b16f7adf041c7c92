"""What a wider or deeper demo model would cost: bytes of the package, seconds of a picture.

    python -m benchmarks.demo_widths 384x6 448x7 512x5

Each WIDTHxDEPTH is a model of random weights beside the demo's own tokenizer and text encoder
sizes, written as the package data is (int8) and drawn from twice by the default plan, the first
time with nothing kept. Both clocks are written down, of the wall and of all cores' work, because
only the second is of use on a machine that others use too. Writes `demo_widths.json`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import _record as record
from benchmarks._options import add_out, parser_of
from examples.train_demo.export import write_model
from examples.train_demo.models import SHIPPED, initial
from sparvar_jax.models.bsq_vae import BsqVae
from sparvar_jax.models.infinity import Infinity
from sparvar_jax.models.t5 import T5Encoder
from sparvar_jax.pipelines.pipeline import Pipeline

PROMPT = "a rocket above a red apple on a dark green background"
HEAD = 64


def write_random(folder: Path, width: int, depth: int) -> int:
    """A model directory of this shape with random weights; its bytes."""
    transformer = dataclasses.replace(
        SHIPPED.transformer, width=width, depth=depth, heads=width // HEAD, mlp_width=4 * width
    )
    config = dataclasses.replace(SHIPPED, transformer=transformer)
    parts = {"transformer": Infinity, "text": T5Encoder, "tokenizer": BsqVae}
    params = {name: initial(kind, getattr(config, name), 0) for name, kind in parts.items()}
    write_model(folder, config, params, "random weights")
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def drawings(folder: Path, size: str) -> dict[str, float]:
    """Seconds, by the wall and of all cores, of a first and a second picture in this process."""
    found: dict[str, float] = {}
    pipe = None
    for name in ("cold", "warm"):
        wall, work = time.perf_counter(), time.process_time()
        pipe = pipe or Pipeline.from_checkpoint(folder)
        pipe(PROMPT, seed=0, size=size)
        found[f"{name}_seconds"] = round(time.perf_counter() - wall, 1)
        found[f"{name}_core_seconds"] = round(time.process_time() - work, 1)
    return found


def measured(shape: str, size: str) -> dict[str, Any]:
    """A row of one shape; it is drawn in a process of its own that finds nothing compiled."""
    width, depth = (int(number) for number in shape.split("x"))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        size_bytes = write_random(folder, width, depth)
        command = [sys.executable, "-m", "benchmarks.demo_widths", "--draw", str(folder)]
        environment = {**os.environ, "XDG_CACHE_HOME": f"{scratch}/cache"}
        done = subprocess.run(
            [*command, "--size", size], env=environment, capture_output=True, text=True, check=True
        )
    row = {"width": width, "depth": depth, "megabytes": round(size_bytes / 1e6, 1)}
    return {**row, **json.loads(done.stdout.splitlines()[-1]), "load": round(os.getloadavg()[0], 1)}


def main() -> None:
    """Measure every shape asked for."""
    parser = parser_of(__doc__)
    parser.add_argument("shapes", nargs="*", metavar="WIDTHxDEPTH")
    parser.add_argument("--draw", type=Path, help="draw with this model and print the seconds")
    parser.add_argument("--size", default="1M")
    add_out(parser)
    asked = parser.parse_args()
    if asked.draw is not None:
        print(json.dumps(drawings(asked.draw, asked.size)))
        return
    rows = []
    for shape in asked.shapes:
        rows.append(measured(shape, asked.size))
        print(rows[-1], flush=True)
        record.write("demo_widths", rows, folder=asked.out)


if __name__ == "__main__":
    main()
