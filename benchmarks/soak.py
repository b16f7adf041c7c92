"""Whether drawing for hours costs more and more: memory, arrays, threads and files, round by round.

    python -m benchmarks.soak --model infinity_2b --pictures 200 --shapes 8

Draws one call a shape in every round, with other plans, batches and seeds; in between, streams
are left half-way and calls are refused. The first rounds compile; from then on nothing may grow.
Rows go to `soak.json`; exit code 1 where something grew.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import gc
import itertools
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import _record as record
from benchmarks import models
from sparvar_jax.cli import console
from sparvar_jax.pipelines.family import families
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.pipelines.pipeline import Pipeline

KEY = ("model", "dtype", "pictures", "shapes")
RATIOS = ("1:1", "16:9", "9:16", "4:3", "3:4", "2:1", "1:2", "3:2")
PLANS = ("dense", "sparvar-fast", "sparvar-fast+drop_uncond(2)")
SLACK = {"device_bytes": 1 << 20, "resident_bytes": 64 << 20, "arrays": 0, "threads": 2, "files": 2}
"""What may come on top after the first rounds: allocators keep some, pools start threads late."""


@dataclasses.dataclass(frozen=True)
class Footprint:
    """What the process holds between two rounds; device_bytes is 0 where no device counts them."""

    device_bytes: int
    resident_bytes: int
    arrays: int
    threads: int
    files: int


def footprint() -> Footprint:
    """What is held now, after collecting what is garbage."""
    gc.collect()
    stats = jax.devices()[0].memory_stats() or {}
    files = Path("/proc/self/fd")
    return Footprint(
        int(stats.get("bytes_in_use", 0)),
        _resident(),
        len(jax.live_arrays()),
        threading.active_count(),
        len(os.listdir(files)) if files.is_dir() else 0,
    )


def _resident() -> int:
    statm = Path("/proc/self/statm")
    return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0


@dataclasses.dataclass(frozen=True)
class Orders:
    """What is drawn: every round one call a shape, with the round's plan and batch.

    subject: batch -> what a call draws. shapes: options of a call each. wrong: options that are
    refused.
    """

    subject: Any
    shapes: Sequence[dict[str, Any]]
    plans: Sequence[str]
    batches: Sequence[int] = (1,)
    wrong: Sequence[dict[str, Any]] = ({"temperature": -1.0}, {"plan": "no such plan"})

    @property
    def cycle(self) -> int:
        """Rounds after which everything has been compiled."""
        return len(self.plans) * len(self.batches)

    def rounds(self) -> Iterator[tuple[str, int]]:
        """(plan, batch) of every round."""
        return itertools.cycle(itertools.product(self.plans, self.batches))


def soak(pipe: Pipeline, orders: Orders, pictures: int) -> tuple[int, list[Footprint]]:
    """(pictures drawn, what was held after every cycle of rounds but the first)."""
    drawn, held = 0, []
    for number, (plan, batch) in enumerate(orders.rounds(), 1):
        for index, shape in enumerate(orders.shapes):
            call = {"plan": plan, "seed": number * 1000 + index, **shape}
            drawn += len(pipe(orders.subject(batch), **call))
            if (number + index) % 4 == 0:
                stream = pipe.stream(orders.subject(batch), **call)
                next(stream)
                stream.close()
            with contextlib.suppress(ValueError):
                pipe(orders.subject(batch), **{**call, **orders.wrong[index % len(orders.wrong)]})
        if number % orders.cycle == 0 and number > orders.cycle:
            held.append(footprint())
            if drawn >= pictures:
                return drawn, held
    raise AssertionError("rounds do not end")


def grown(held: Sequence[Footprint]) -> dict[str, int]:
    """By how much each quantity grew beyond its slack, after the first cycle that was measured."""
    first = dataclasses.asdict(held[0])
    most = {name: max(getattr(one, name) for one in held) for name in first}
    excess = {name: most[name] - first[name] - SLACK[name] for name in first}
    return {name: value for name, value in excess.items() if value > 0}


def pipeline_of(name: str, dtype: str | None) -> tuple[Pipeline, Any]:
    """A released shape or a model directory as a pipeline, and what makes its subjects."""
    parts = models.build(name, dtype=dtype)
    kind = "classes" if parts.draws_classes else "prompts"
    family = next(family for family in families() if family.draws == kind)
    model = Model(family, parts.transformer, parts.tokenizer, name=parts.name)
    pipe = Pipeline(model, text_encoder=False)
    if parts.draws_classes:
        return pipe, lambda batch: list(range(batch))
    config = parts.transformer.config
    features = {
        batch: models.text_features(batch, config.text_width, config.text_max_length)
        for batch in (1, 2)
    }
    return pipe, features.__getitem__


def main(arguments: list[str] | None = None) -> int:
    """Soak one model; 1 where something grew."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="infinity_2b", help="a released shape, or a folder")
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--shapes", type=int, default=8, help=f"1..{2 * len(RATIOS)}")
    parser.add_argument("--plans", nargs="+", default=list(PLANS))
    parser.add_argument("--size", default="1M", help="of the pictures; the second eight are 0.25M")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--out", default=None, help="folder for soak.json")
    asked = parser.parse_args(arguments)
    console.use_compilation_cache()
    pipe, subject = pipeline_of(asked.model, asked.dtype)
    shapes: list[dict[str, Any]] = [
        {"aspect_ratio": ratio, "size": size} for size in (asked.size, "0.25M") for ratio in RATIOS
    ]
    shapes = [{}] if pipe.model.family.draws == "classes" else shapes[: asked.shapes]
    start = time.perf_counter()
    drawn, held = soak(pipe, Orders(subject, shapes, asked.plans), asked.pictures)
    row = {
        "model": pipe.model.name,
        "dtype": pipe.model.transformer.config.dtype,
        "pictures": asked.pictures,
        "shapes": len(shapes),
        "plans": asked.plans,
        "drawn": drawn,
        "seconds": round(time.perf_counter() - start, 1),
        "first": dataclasses.asdict(held[0]),
        "last": dataclasses.asdict(held[-1]),
        "grown": grown(held),
    }
    record.add("soak", row, key=KEY, folder=asked.out)
    print(row)
    return 1 if row["grown"] else 0


if __name__ == "__main__":
    sys.exit(main())
