"""Every plan on one chart: how near its pictures are to the dense ones, against what they cost."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sparvar_jax.pipelines.memory import estimate
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import Plan
from sparvar_jax.study import features
from sparvar_jax.study.compare_pictures import picture_measures

Row = dict[str, Any]
DENSE = "dense"
FLOOR = f"csla(windows={(999,) * 13}, first_scale=1)"
"""Dense attention by other kernels: windows that hide nothing, in blocks. Its distance to the dense
pictures is what rounding alone does."""
PLANS = (
    FLOOR,
    "drop_uncond(1)",
    "drop_uncond(2)",
    "drop_uncond(3)",
    "share_rows(1)",
    "share_rows(3)",
    "drop_uncond(0, ((-1, 0.5),))",
    "drop_uncond(1, ((-3, 0.75), (-2, 0.5)))",
    "skip_last_scales(1)",
    "skip_last_scales(2)",
    "skip_last_scales(1) + drop_uncond(2)",
    "prune(0.4)",
    "prune(0.4, (8, 16))",
    "prune(0.4) + drop_uncond(1)",
    "prune(0.4, (8, 16)) + drop_uncond(3)",
    "prune(0.4, (8, 16)) + drop_uncond(5)",
    "fastvar()",
    "fastvar(((-2, 0.6), (-1, 0.7)), -3, 0)",
    "almost-lossless",
    "balanced",
    "fastest",
    "sparvar-paper",
    "sparvar-fast",
    "sparvar-fast + drop_uncond(3)",
    "sparvar-fast + prune(0.4, (8, 16))",
    "adaptive(0.9)",
    "scalekv(keep=0.1)",
    "router()",
)


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What a plan drew of all subjects, and the seconds of a picture."""

    pictures: np.ndarray
    tokens: list[np.ndarray]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Chart:
    """Draws plans with one pipeline on the same subjects and seeds.

    subjects: prompts or classes. batch: drawn together. repeats: timed draws after the first one;
    0 times the first. options: of `Pipeline.request`.
    """

    pipe: Pipeline
    subjects: Sequence[Any]
    seed: int = 0
    batch: int = 1
    repeats: int = 1
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def clock(self) -> Callable[[], float]:
        """Seconds of all cores on a CPU, which may be shared with others; else those of a wall."""
        return time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def request(self, first: int, plan: str) -> Any:
        """The request of the subjects from `first` on that are drawn together."""
        some = list(self.subjects[first : first + self.batch])
        return self.pipe.request(some, plan=plan, seed=self.seed + first, **dict(self.options))

    def draw(self, plan: str) -> Drawn:
        """Pictures and tokens of all subjects."""
        pictures, tokens, spent = [], [], []
        for first in range(0, len(self.subjects), self.batch):
            request = self.request(first, plan)
            count = request.keys.shape[0]
            self.pipe.generator.compile(request.plan, request.condition, count, how=request.how)
            for repeat in range(self.repeats + 1):
                before = self.clock()
                code_sum, outputs = self.pipe.generator.run(
                    request.plan, request.condition, request.controls, request.keys, how=request.how
                )
                jax.block_until_ready(code_sum)
                if repeat or not self.repeats:
                    spent.append((self.clock() - before) / count)
            pictures.append(self.pipe.decode(code_sum))
            tokens.append([np.asarray(output.tokens) for output in outputs])
        same = [np.concatenate(parts) for parts in zip(*tokens, strict=False)]
        return Drawn(np.concatenate(pictures), same, float(np.median(spent)))

    def cost(self, plan: Plan) -> Row:
        """What a plan needs by counting: memory of one batch, products, pairs."""
        memory = estimate(self.pipe.model, plan, min(self.batch, len(self.subjects)))
        return {
            "cache_mib": memory.cache / 2**20,
            "peak_mib": memory.peak / 2**20,
            "work": plan.work(),
            "density": plan.density(),
        }


def measure(
    chart: Chart,
    plans: Sequence[str] = PLANS,
    *,
    known: Sequence[Row] = (),
    write: Callable[[list[Row]], Any] | None = None,
    deadline: float = float("inf"),
) -> list[Row]:
    """One row a plan, the dense one first; means over the pictures.

    known: rows measured before, which are not measured again unless they failed. write: given the
    rows so far after every plan. deadline (`time.perf_counter`): plans not begun by then are left
    out. A plan that cannot run on this model gets a row that says why.
    """
    dense = chart.draw(DENSE)
    compare = picture_measures(features.load())
    cost = chart.cost(chart.request(0, DENSE).plan)
    rows: list[Row] = [row for row in known if "failed" not in row]
    if not rows:
        rows = [{"plan": DENSE, "bits_equal": 1.0, "seconds": dense.seconds, **cost}]
    seen = {chart.request(0, row["plan"]).plan: row for row in rows}
    done = {row["plan"] for row in rows}
    for name in dict.fromkeys(plan for plan in plans if plan not in done):
        if time.perf_counter() > deadline:
            break
        try:
            plan = chart.request(0, name).plan
            if plan not in seen:
                seen[plan] = _row(chart, plan, name, dense, compare)
            rows.append({**seen[plan], "plan": name})
        except ValueError as error:
            rows.append({"plan": name, "failed": str(error)})
        if write is not None:
            write(rows)
    return rows


def _row(chart: Chart, plan: Plan, name: str, dense: Drawn, compare: Callable[..., Any]) -> Row:
    """What one plan drew, beside the dense pictures."""
    drawn = chart.draw(name)
    whole = np.ones(dense.pictures.shape[:3], np.float32)
    found = compare(dense.pictures, drawn.pictures, whole)
    return {
        **{measure: float(value.mean()) for measure, value in found.items()},
        "bits_equal": bits_equal(dense.tokens, drawn.tokens),
        "seconds": drawn.seconds,
        **chart.cost(plan),
    }


def describe(chart: Chart) -> Row:
    """What a chart belongs to."""
    shape = {key: value for key, value in chart.options if value is not None}
    return {
        "model": chart.pipe.model.name,
        "device": jax.devices()[0].device_kind,
        "dtype": chart.pipe.model.transformer.config.dtype,
        "jax": jax.__version__,
        "pictures": len(chart.subjects),
        "seed": chart.seed,
        "batch": chart.batch,
        **shape,
        "clock": "seconds of all cores" if jax.default_backend() == "cpu" else "seconds",
    }


def bits_equal(dense: Sequence[np.ndarray], ours: Sequence[np.ndarray]) -> float:
    """Share of the dense pictures' bits (or ids) drawn alike; what is not drawn is not alike."""
    alike = sum(int((a == b).sum()) for a, b in zip(dense, ours, strict=False))
    return alike / sum(a.size for a in dense)
