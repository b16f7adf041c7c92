"""Dense generation against plans on this device with this model: time, memory, likeness.

Everything a plan draws starts from the same subject and seed as the dense pictures, so that what
differs is the plan. Times are of whole calls; times by part wait for the device after every part
and are therefore a little longer together.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import UInt8

from sparvar_jax.pipelines import metadata
from sparvar_jax.pipelines.memory import estimate
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.runtime.progress import Progress
from sparvar_jax.study.picture_metrics import psnr, ssim

DENSE = "dense"
PROMPTS = (
    "a rocket above a red apple on a dark green background",
    "a smiling cat",
    "an astronaut riding a horse",
    "a lighthouse on a cliff at night",
)
"""Prompts where none are given, in turn."""

Drawn = UInt8[np.ndarray, "B height width 3"]


@dataclasses.dataclass(frozen=True)
class Row:
    """What one plan took and gave.

    compile_seconds: until everything was ready to run. seconds: median of whole calls; spread:
    largest less smallest. parts: seconds of text, transformer and decoding, each waited for.
    planned_gib: estimated from shapes. peak_gib: of the process or device, where this plan raised
    it. psnr (dB), ssim: against the dense pictures, mean; None for dense itself.
    """

    plan: str
    density: float
    compile_seconds: float
    seconds: float
    spread: float
    parts: Mapping[str, float]
    images_per_second: float
    planned_gib: float
    peak_gib: float | None
    psnr: float | None
    ssim: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """All rows, the pictures of every plan, and what was measured on what."""

    rows: tuple[Row, ...]
    pictures: Mapping[str, Drawn]
    about: Mapping[str, str]


def measure(
    pipe: Pipeline,
    plans: Sequence[str],
    *,
    subject: Any = None,
    num: int = 1,
    seed: int = 0,
    repeats: int = 5,
    progress: Progress | None = None,
    **options: Any,
) -> Report:
    """Draw with the dense plan and with others, and compare.

    Args:
        plans: as texts, such as "sparvar-fast+drop_uncond(3)"; dense is always first.
        subject: prompts or classes; by default `PROMPTS`, or classes spread over all.
        num: pictures a call, where no subject is given.
        repeats: timed calls of every plan after one that is not.
        progress: called as ("measure", plans done, plans).
        options: of the family, such as `size`.

    Raises:
        ValueError: a plan that cannot be drawn, before anything is.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    subject = default_subject(pipe, num) if subject is None else subject
    names = list(dict.fromkeys([DENSE, *plans]))
    for name in names:
        pipe.request(subject, seed=seed, plan=name, **options)
    rows, pictures = [], {}
    for done, name in enumerate(names, 1):
        drawing = {"seed": seed, "plan": name, **options}
        row, pictures[name] = _measure_one(pipe, subject, drawing, repeats, pictures.get(DENSE))
        rows.append(row)
        if progress:
            progress("measure", done, len(names))
    return Report(tuple(rows), pictures, _about(pipe, pictures[DENSE], seed, repeats))


def default_subject(pipe: Pipeline, num: int) -> list[Any]:
    """What is drawn where nobody says: prompts in turn, or classes spread over all."""
    if pipe.model.family.draws == "prompts":
        return [PROMPTS[index % len(PROMPTS)] for index in range(num)]
    classes = pipe.model.transformer.config.classes
    return [index * classes // num for index in range(num)]


def _measure_one(
    pipe: Pipeline, subject: Any, drawing: dict[str, Any], repeats: int, dense: Drawn | None
) -> tuple[Row, Drawn]:
    before, start = _peak_bytes(), time.perf_counter()
    pipe.warm_up(subject, **drawing)
    compiled = time.perf_counter() - start
    pictures = np.asarray(pipe(subject, **drawing))
    laps = [_lap(lambda: pipe(subject, **drawing)) for _ in range(repeats)]
    seconds, peak = statistics.median(laps), _peak_bytes()
    plan = pipe.request(subject, **drawing).plan
    likeness = (None, None) if dense is None else compare(dense, pictures)
    row = Row(
        plan=drawing["plan"],
        density=plan.density(),
        compile_seconds=compiled,
        seconds=seconds,
        spread=max(laps) - min(laps),
        parts=_parts(pipe, subject, drawing),
        images_per_second=len(pictures) / seconds,
        planned_gib=estimate(pipe.model, plan, len(pictures)).peak / (1 << 30),
        peak_gib=peak / (1 << 30) if peak > before else None,
        psnr=likeness[0],
        ssim=likeness[1],
    )
    return row, pictures


def _parts(pipe: Pipeline, subject: Any, drawing: dict[str, Any]) -> dict[str, float]:
    """Seconds of every part of one call, the device waited for after each."""
    laps, start = {}, time.perf_counter()
    if pipe.model.family.draws == "prompts":
        subject = jax.block_until_ready(pipe.encode_text(subject))
        laps["text"] = time.perf_counter() - start
    start, total = time.perf_counter(), None
    for state, _ in pipe.steps(pipe.request(subject, **drawing)):
        total = state.code_sum
    total = jax.block_until_ready(total)
    laps["transformer"], start = time.perf_counter() - start, time.perf_counter()
    pipe.decode(jnp.asarray(total))
    return {**laps, "decode": time.perf_counter() - start}


def compare(a: Drawn, b: Drawn) -> tuple[float, float]:
    """(PSNR in dB, SSIM), means over a batch; pictures need at least 11 pixels a side."""
    one, other = (jnp.asarray(pictures, jnp.float32) / 255 for pictures in (a, b))
    weights = jnp.ones(one.shape[:3])
    return float(psnr(one, other, weights).mean()), float(ssim(one, other, weights).mean())


def _lap(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _peak_bytes() -> int:
    """Most memory so far: of the device where it says so, else of this process."""
    told = jax.devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in told:
        return told["peak_bytes_in_use"]
    try:
        import resource
    except ImportError:  # not on this system
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _about(pipe: Pipeline, pictures: Drawn, seed: int, repeats: int) -> dict[str, str]:
    device = jax.devices()[0]
    batch, height, width = pictures.shape[:3]
    return {
        "model": pipe.model.name,
        "device": device.device_kind,
        "dtype": str(pipe.model.transformer.config.dtype),
        "pictures a call": f"{batch} of {width}x{height}",
        "seed": str(seed),
        "timed calls": str(repeats),
        "memory": "device" if device.memory_stats() else "process",
        "versions": ", ".join(f"{name} {v}" for name, v in metadata.versions().items()),
    }
