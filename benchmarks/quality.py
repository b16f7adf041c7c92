"""What a plan costs in quality: its pictures against the dense ones, same prompts and seeds.

    python -m benchmarks.quality MODEL_DIR --plans sparvar-paper "adaptive(0.9)"

Accepts any model directory. Pictures are drawn at the model's default guidance and temperature. For
every plan and subset (single things, scenes, the objects' boxes): PSNR, SSIM, MS-SSIM and one
learned distance to the dense picture, kept work, and, with the dense picture's bits fed back, how
far the logits are off and how many bits would be drawn alike. Writes JSON, a table, sheets and
charts.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from benchmarks import _record as record
from benchmarks import quality_report
from benchmarks._options import add_out
from benchmarks.quality_drawing import Drawing
from benchmarks.quality_plans import DEFAULT_PLANS
from benchmarks.teacher_forcing import LogitComparison
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.plan import Plan
from sparvar_jax.study import features
from sparvar_jax.study.compare_pictures import Measured, picture_measures
from sparvar_jax.study.picture_metrics import object_box

DEMO_PROMPTS = pathlib.Path(__file__).resolve().parents[1] / "examples/train_demo/prompts.json"
SUBSETS = ("single", "scenes")
COMPILING_PLANS = 6


def read_prompts(file: pathlib.Path, limit: int | None) -> list[tuple[str, str]]:
    """(subset, prompt) pairs from JSON lists named "single" and "scenes", or from lines of text."""
    if file.suffix != ".json":
        lines = [line.strip() for line in file.read_text().splitlines() if line.strip()]
        return [("prompts", line) for line in lines[:limit]]
    lists = json.loads(file.read_text())
    pairs = []
    for subset in SUBSETS:
        entries = lists.get(subset, [])[:limit]
        pairs += [(subset, e["prompt"] if isinstance(e, dict) else e) for e in entries]
    if not pairs:
        raise ValueError(f"{file} must hold lists named {' or '.join(SUBSETS)}, got {list(lists)}")
    return pairs


def box_weights(pictures: np.ndarray, kinds: list[str]) -> np.ndarray:
    """Ones inside the object's box of single things, zeros elsewhere, [B, height, width]."""
    weights = np.zeros(pictures.shape[:3], np.float32)
    for weight, picture, kind in zip(weights, pictures, kinds, strict=True):
        if kind == "single":
            weight[object_box(picture / 255.0)] = 1
    return weights


def rows_of(
    name: str,
    work: dict[str, Any],
    values: dict[str, tuple[np.ndarray, Measured]],
    logits: dict[str, Any],
) -> list[dict[str, Any]]:
    """One row a subset; `values` maps it to (which pictures, measures of all pictures)."""
    rows = []
    for subset, (members, measured) in values.items():
        means = {key: float(value[members].mean()) for key, value in measured.items()}
        rows.append(
            {
                "plan": name,
                "subset": subset,
                "prompts": int(members.sum()),
                **{key: means.get(key) for key in ("psnr", "ssim", "ms_ssim", "distance")},
                "psnr_min": float(measured["psnr"][members].min()),
                **work,
                **logits,
            }
        )
    return rows


def dense_row(subset: str, prompts: int, work: dict[str, Any]) -> dict[str, Any]:
    """The row of the pictures that all others are compared with."""
    measures = dict.fromkeys(("psnr", "ssim", "ms_ssim", "distance"))
    return {
        "plan": "dense",
        "subset": subset,
        "prompts": prompts,
        **measures,
        **work,
        "bit_agreement": 1.0,
    }


class Comparison:
    """Plans beside the dense pictures of a drawing; keeps the pictures of `sheets`."""

    def __init__(self, drawing: Drawing, kinds: list[str], teacher: int, sheets: list[str]):
        dense = drawing.plan("dense")
        drawing.compile(dense)
        reference = drawing.draw(dense)
        self._drawing, self._dense, self._sheets = drawing, reference.pictures, sheets
        self._whole = np.ones(self._dense.shape[:3], np.float32)
        self._boxes = box_weights(self._dense, kinds)
        self._subsets = {kind: np.array([k == kind for k in kinds]) for kind in kinds}
        self._logits = LogitComparison(drawing, reference.tokens[0], teacher) if teacher else None
        self._measure = picture_measures(features.load())
        self.pictures = {"dense": self._dense}
        counts = {kind: int(members.sum()) for kind, members in self._subsets.items()}
        if self._boxes.any():
            counts["boxes"] = int(self._boxes.any((1, 2)).sum())
        self.dense_rows = [dense_row(kind, n, reference.work) for kind, n in counts.items()]

    def prepare(self, plan: Plan) -> dict[str, Any]:
        """Compile a plan, and compare its logits where prompts are fed the dense bits."""
        self._drawing.compile(plan)
        return self._logits.figures(plan) if self._logits else {}

    def rows(self, name: str, plan: Plan, logits: dict[str, Any]) -> list[dict[str, Any]]:
        """Draw with a compiled plan; one row a subset."""
        drawn = self._drawing.draw(plan)
        if name in self._sheets:
            self.pictures[name] = drawn.pictures
        full = self._measure(self._dense, drawn.pictures, self._whole)
        values = {kind: (members, full) for kind, members in self._subsets.items()}
        if self._boxes.any():
            inside = self._measure(self._dense, drawn.pictures, self._boxes)
            values["boxes"] = (self._boxes.any((1, 2)), inside)
        return rows_of(name, drawn.work, values, logits)


def measure_plans(
    drawing: Drawing,
    comparison: Comparison,
    names: list[str],
    deadline: float,
    write: Callable[[list[dict[str, Any]]], Any],
) -> list[dict[str, Any]]:
    """Rows of all plans; `write` gets those so far after every plan.

    Later plans compile while earlier ones draw, so seconds are measured at the end, when nothing
    else runs. Plans that are not compiled by `deadline` (`time.perf_counter`) are left out, and
    said to be.
    """
    start = time.perf_counter()
    plans = {name: drawing.plan(name) for name in dict.fromkeys(names) if name != "dense"}
    pool = ThreadPoolExecutor(COMPILING_PLANS)
    prepared = {name: pool.submit(comparison.prepare, plan) for name, plan in plans.items()}
    rows, done = list(comparison.dense_rows), {"dense": drawing.plan("dense")}
    for name, plan in plans.items():
        left = max(deadline - time.perf_counter(), 0)
        try:
            logits = prepared[name].result(None if math.isinf(left) else left)
        except TimeoutError:
            print(f"left out for time: {name}", flush=True)
            continue
        new = comparison.rows(name, plan, logits)
        rows, done[name] = rows + new, plan
        write(rows)
        print(f"{time.perf_counter() - start:.0f} s {quality_report.line(new)}", flush=True)
    pool.shutdown(cancel_futures=True)
    times = {name: drawing.seconds(plan) for name, plan in done.items()}
    return [{**row, **times[row["plan"]]} for row in rows]


def main() -> None:
    """Measure plans on a checkpoint and write results, table, sheets and chart."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model", nargs="?", default=None, help="model directory; none: the demo")
    parser.add_argument("--plans", nargs="+", default=list(DEFAULT_PLANS))
    parser.add_argument("--prompts", type=pathlib.Path, default=DEMO_PROMPTS)
    parser.add_argument("--limit", type=int, default=None, help="prompts of every subset")
    parser.add_argument("--seed", type=int, default=0, help="picture b draws from seed + b")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--teacher", type=int, default=8, help="prompts with bits fed back; 0: none"
    )
    parser.add_argument("--budget-seconds", type=float, default=math.inf)
    parser.add_argument("--size", default=None)
    parser.add_argument("--aspect", default=None, help="W:H")
    parser.add_argument("--dtype", default=None)
    parser.add_argument("--sheets", nargs="*", default=["sparvar-paper", "sparvar-fast"])
    parser.add_argument("--name", default="quality")
    add_out(parser)
    arguments = parser.parse_args()
    deadline = time.perf_counter() + arguments.budget_seconds
    pipe = Pipeline.from_checkpoint(arguments.model, dtype=arguments.dtype)
    pairs = read_prompts(arguments.prompts, arguments.limit)
    kinds, prompts = [kind for kind, _ in pairs], [prompt for _, prompt in pairs]
    shape = {"size": arguments.size, "aspect_ratio": arguments.aspect}
    drawing = Drawing(pipe, prompts, min(arguments.batch, len(prompts)), arguments.seed, **shape)
    common = {
        "model": pipe.model.name,
        "distance_name": features.NAME,
        "dtype": pipe.model.transformer.config.dtype,
    }

    def write(rows: list[dict[str, Any]]) -> pathlib.Path:
        named = [{**row, **common} for row in rows]
        return record.write(arguments.name, named, folder=arguments.out)

    comparison = Comparison(drawing, kinds, arguments.teacher, arguments.sheets)
    rows = measure_plans(drawing, comparison, arguments.plans, deadline, write)
    file = write(rows)
    quality_report.write(file, rows, comparison.pictures, kinds)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
