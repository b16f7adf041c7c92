"""What the server costs over the pipeline: latency at one client, pictures a second at many.

    python -m benchmarks.serve --models demo infinity_2b --batches 1 2 4 8 --clients 1 8 32

Clients run in a process of their own. Rows go to `serve.json`: `added_ms` is the median answer less
the median of the pipeline with writing the same PNG file; `share` is pictures a second over those
of the pipeline alone at its best batch. Needs the extra `serve`, and httpx.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from benchmarks import _record as record
from benchmarks import models
from benchmarks._options import add_out, parser_of
from benchmarks.serve_client import PROMPT
from sparvar_jax.cli import console
from sparvar_jax.models.t5 import T5Encoder
from sparvar_jax.models.text_tokens import Tokenizer
from sparvar_jax.pipelines.family import INFINITY
from sparvar_jax.pipelines.loading import Model, compute_dtype
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.serve import running
from sparvar_jax.serve.app import create_app
from sparvar_jax.serve.menu import Menu
from sparvar_jax.serve.pictures import Encoding
from sparvar_jax.serve.settings import Settings
from sparvar_jax.serve.warming import warm_up

KEY = ("model", "plan", "clients", "batches")


def pipeline_of(name: str) -> Pipeline:
    """The demo model, a model directory, or a released shape with random weights."""
    if name == "demo" or Path(name).is_dir():
        return Pipeline.from_checkpoint(None if name == "demo" else name)
    parts = models.build(name)
    config = dataclasses.replace(models.T5_XL, dtype=compute_dtype(None))
    text = models.randomise(models.abstract(T5Encoder, config), 2)
    pieces = list(range(2, models.TEXT_TOKENS + 1))
    tokenizer = Tokenizer("made up", config.vocab, lambda prompt: pieces)
    return Pipeline(
        Model(INFINITY, parts.transformer, parts.tokenizer, text, tokenizer, name=parts.name)
    )


def pipeline_seconds(pipe: Pipeline, options: dict[str, Any], batch: int, repeats: int) -> float:
    """Median seconds of one call."""
    return statistics.median(_timed(lambda: pipe([PROMPT] * batch, **options), repeats))


def answer_seconds(pipe: Pipeline, options: dict[str, Any], repeats: int) -> tuple[float, float]:
    """Median seconds of a picture with its file as text, and of the file alone."""
    encoding, told = Encoding(), {"prompt": PROMPT}
    (picture,) = pipe([PROMPT], **options)
    file = statistics.median(_timed(lambda: encoding.base64(picture, told), repeats))

    def whole() -> None:
        encoding.base64(pipe([PROMPT], **options)[0], told)

    return statistics.median(_timed(whole, repeats)), file


def _timed(work: Any, repeats: int) -> list[float]:
    work()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        found.append(time.perf_counter() - start)
    return found


@contextlib.contextmanager
def served(pipe: Pipeline, settings: Settings) -> Iterator[str]:
    """The address of a server in this process."""
    bound = running.bind("127.0.0.1", 0)
    config = uvicorn.Config(create_app(pipe, settings), log_level="warning", access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield running.address_of(bound)
    finally:
        server.should_exit = True
        thread.join()


def clients_of(address: str, clients: int, seconds: float) -> dict[str, Any]:
    """What `benchmarks.serve_client` measures."""
    options = ["--clients", str(clients), "--seconds", str(seconds)]
    command = [sys.executable, "-m", "benchmarks.serve_client", address, *options]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout)


def measure(name: str, asked: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row a number of clients."""
    pipe = pipeline_of(name)
    settings = Settings(
        plans=(asked.plan,),
        batches=tuple(asked.batches),
        prompt_tokens=32,
        negative=False,
        waiting=max(64, *asked.clients),
        seconds=600,
    )
    warm_up(pipe, settings)
    options = next(Menu(pipe, settings).buckets()).options
    best = {
        batch: batch / pipeline_seconds(pipe, options, batch, asked.repeats)
        for batch in settings.batches
    }
    alone, file = answer_seconds(pipe, options, asked.repeats)
    batch = max(best, key=lambda size: best[size])
    with served(pipe, settings) as address:
        for clients in asked.clients:
            found = clients_of(address, clients, asked.seconds)
            median = statistics.median(found["seconds"])
            rate = len(found["seconds"]) / found["whole"]
            yield {
                "model": pipe.model.name,
                "plan": asked.plan,
                "clients": clients,
                "batches": list(settings.batches),
                "answers": len(found["seconds"]),
                "seconds_median": median,
                "seconds_worst": max(found["seconds"]),
                "added_ms": (median - alone) * 1e3 if clients == 1 else None,
                "file_ms": file * 1e3,
                "pipeline_seconds": alone - file,
                "images_per_second": rate,
                "pipeline_images_per_second": best[batch],
                "pipeline_batch": batch,
                "share": rate / best[batch],
            }


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the rows."""
    parser = parser_of(__doc__)
    parser.add_argument("--models", nargs="+", default=["demo"], help="demo, shapes or directories")
    parser.add_argument("--plan", default="dense")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=20.0, help="of every number of clients")
    parser.add_argument("--repeats", type=int, default=10)
    add_out(parser)
    asked = parser.parse_args(arguments)
    console.use_compilation_cache()
    for name in asked.models:
        for row in measure(name, asked):
            record.add("serve", row, key=KEY, folder=asked.out)
            print(line(row), flush=True)


def line(row: dict[str, Any]) -> str:
    """One row in one line of text."""
    added = "" if row["added_ms"] is None else f", {row['added_ms']:.1f} ms added"
    rate = f"{row['images_per_second']:.2f} images/s ({row['share']:.0%} of the pipeline)"
    head = f"{row['model']} {row['clients']} clients: {rate}"
    return f"{head}, median {row['seconds_median']:.4f} s{added}"


if __name__ == "__main__":
    main()
