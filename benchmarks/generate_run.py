"""Runs groups of generations one after the other under a budget; hands on every finished row."""

from __future__ import annotations

import dataclasses
import functools
import gc
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from benchmarks import generate_stats as stats
from benchmarks import models
from benchmarks._trace import kernel_times
from benchmarks.generate_bench import PROMPT, Bench, measure
from benchmarks.generate_check import check, checkable
from benchmarks.generate_suites import Group
from pallas_kernels import backends
from sparvar_jax.cli import console
from sparvar_jax.pipelines.loading import compute_dtype
from sparvar_jax.plans.plan import Plan

MEASURE_SECONDS = 5.0  # what a group, or a check, needs besides compiling, roughly

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """How rows are measured. dtype, fused: None is the default of the device and of the kernels.

    matrices: "int8" rounds those of the transformer's blocks to 8 bits, with what they multiply,
    and weights of a T5 encoder. stream: of the residual stream, None for the model's own.
    trace: also sum GPU time by kernel. check: compare rows with XLA.
    """

    repeats: int = 5
    dtype: str | None = None
    fused: str | None = None
    matrices: str = "dense"
    stream: str | None = None
    trace: bool = False
    check: bool = True


@dataclasses.dataclass
class Pace:
    """What still fits into a budget of seconds, at the pace of the last group compiled."""

    budget: float
    start: float = dataclasses.field(default_factory=time.perf_counter)
    per_program: float = 0.0

    @property
    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.start)

    def fits(self, programs: int) -> bool:
        """Whether compiling so many programs, and measuring, should end in time."""
        return self.left > programs * self.per_program + MEASURE_SECONDS

    def compiled(self, programs: int, seconds: float) -> None:
        """Learn from a group that compiled so many programs in so many seconds."""
        if programs:
            self.per_program = seconds / programs


class Loader:
    """Makes benches; keeps the last model, and the last bench with its compiled steps."""

    def __init__(self, options: Options):
        self._options = options
        self._parts: models.Parts | None = None
        self._bench: Bench | None = None
        self._model = self._group = None
        self.weights_seconds = 0.0

    def bench(self, group: Group) -> Bench:
        """The bench of a group; whatever does not belong to it is freed first."""
        if self._bench is not None and self._group == group.bench:
            return self._bench
        self._free(parts=self._model != group.model or group.text == "encoder freed")
        text: Any = None
        dtype, matrices = self._options.dtype, self._options.matrices
        if group.text == "encoder freed":
            encoder = models.text_encoder(group.model, dtype=dtype, matrices=matrices)
            text = encoder([PROMPT] * group.batch)
            jax.block_until_ready(text.features)
            del encoder
        if self._parts is None:
            before = time.perf_counter()
            fused, stream = self._options.fused, self._options.stream
            self._parts = models.build(
                group.model, dtype=dtype, fused=fused, matrices=matrices, stream=stream
            )
            self.weights_seconds = time.perf_counter() - before
            self._model = group.model
        if group.text == "encoder":
            text = models.text_encoder(group.model, dtype=dtype, matrices=matrices)
        self._bench = Bench(self._parts, group.batch, group.size, text, group.cache)
        self._group = group.bench
        return self._bench

    def _free(self, *, parts: bool) -> None:
        self._bench = None
        if parts:
            self._parts = None
        gc.collect()


def run(
    groups: Sequence[Group], options: Options, budget: float, report: Callable[[Row], None]
) -> list[str]:
    """Measure groups in order while the budget lasts; returns what failed or was left out.

    report: gets every row as soon as it is measured, and again once it is checked. A group that
    the budget has no room for is skipped, and later, smaller ones may still run.
    """
    pace, loader, problems = Pace(budget), Loader(options), []
    ceiling = stats.matmul_ceiling()
    for group in groups:
        label = f"{group.model} x{group.batch} {group.size or ''} {group.text} {group.cache}"
        if pace.left < MEASURE_SECONDS:
            problems.append(f"left out for time: {label} {', '.join(group.plans)}")
            continue
        try:
            bench = loader.bench(group)
            plans = [bench.plan(name) for name in group.plans]
            programs = bench.new_programs(plans)
            if not pace.fits(programs):
                problems.append(f"left out for time: {label} {', '.join(group.plans)}")
                continue
            compiled = _compile(bench, plans, pace)
        except RuntimeError as error:
            problems.append(f"{label}: {_first_line(error)}")
            continue
        base = _base_row(group, bench, options, loader.weights_seconds)
        base |= {**compiled, "matmul_ceiling_tflops": ceiling}
        for plan in plans:
            problem = _plan_rows(bench, plan, base, options, pace, report)
            if problem:
                problems.append(f"{label} {plan.name}: {problem}")
        del bench
    return problems


def _compile(bench: Bench, plans: Sequence[Plan], pace: Pace) -> Row:
    """Compile a group. cold: all its programs were new to the process and to the cache."""
    programs, before = bench.new_programs(plans), console.count_programs()
    fresh, start = bench.is_fresh, time.perf_counter()
    bench.compile(plans)
    seconds = time.perf_counter() - start
    pace.compiled(programs, seconds)
    found = console.count_programs()[1] - before[1]
    return {
        "compile_seconds": seconds,
        "programs": programs,
        "programs_from_cache": found,
        "cold": fresh and not found,
    }


def _base_row(group: Group, bench: Bench, options: Options, weights_seconds: float) -> Row:
    return {
        "model": bench.parts.name,
        "batch": group.batch,
        "size": None if bench.parts.one_size else group.size or bench.parts.size,
        "text": group.text,
        "dtype": compute_dtype(options.dtype),
        "fused": options.fused or "default",
        **({} if options.matrices == "dense" else {"matrices": options.matrices}),
        **({} if options.stream is None else {"stream": options.stream}),
        **({} if backends.path() is None else {"path": backends.path()}),
        **({} if group.cache == "full" else {"cache": group.cache}),
        "weights": bench.parts.weights,
        "weights_seconds": weights_seconds,
    }


def _plan_rows(
    bench: Bench,
    plan: Plan,
    base: Row,
    options: Options,
    pace: Pace,
    report: Callable[[Row], None],
) -> str | None:
    """Measure and check one plan; returns why it must not be believed, if so."""
    try:
        row = base | measure_row(bench, plan, base, options)
        report(row)
        if not options.check or not checkable(plan):
            return None
        if pace.left < MEASURE_SECONDS:
            return "not checked for time"
        done = check(bench, plan)
        report(row | {"check": dataclasses.asdict(done) | {"problem": done.problem}})
        return done.problem
    except RuntimeError as error:
        report(base | {"plan": plan.name, "failed": _first_line(error)})
        return _first_line(error)
    finally:
        bench.release(plan)
        gc.collect()


def measure_row(bench: Bench, plan: Plan, base: Row, options: Options) -> Row:
    """Everything measured of one compiled plan."""
    reached = stats.peak_bytes()
    row: Row = {"plan": plan.name, "density": plan.density(), "density_all": plan.density(None)}
    row |= measure(bench, plan, options.repeats)
    peak = stats.peak_bytes()
    # A process's high-water mark never falls, so it is this row's only where drawing raised it.
    row["peak_gib"] = peak / stats.GIB if peak and peak != reached else None
    row["planned_gib"] = stats.memory(bench, plan)
    cold = base["compile_seconds"] + row["first_draw_seconds"]
    row["cold_seconds"] = cold if base["cold"] else None
    row["kernels"] = stats.implementations(bench, plan)
    row["custom_calls"] = stats.custom_calls(bench, plan)
    row["transformer_tflop"] = stats.transformer_tflop(bench, plan)
    row["tflops"] = row["transformer_tflop"] / row["seconds_median"]
    if options.trace:
        row["kernel_ms"] = kernel_times(functools.partial(bench.draw, plan))
    return row


def _first_line(error: Exception) -> str:
    if "RESOURCE_EXHAUSTED" in str(error):  # jax has one error class for all of XLA
        return "out of memory"
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
