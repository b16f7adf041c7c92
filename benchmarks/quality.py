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
import dataclasses
import json
import math
import pathlib
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record as record
from benchmarks import features, quality_report
from benchmarks.picture_metrics import ms_ssim, object_box, psnr, ssim
from benchmarks.quality_plans import DEFAULT_PLANS
from benchmarks.teacher_forcing import LogitComparison
from sparvar_jax.models import bsq_vae
from sparvar_jax.pipeline import Pipeline, resolve_plan, resolve_schedule
from sparvar_jax.plan import LAST_SCALES, Plan, with_implementation

DEMO_PROMPTS = pathlib.Path(__file__).resolve().parents[1] / "examples/train_demo/prompts.json"
SUBSETS = ("single", "scenes")
COMPILING_PLANS = 6
SMALLEST_SIDE = 176  # five scales of MS-SSIM need so many pixels

Measured = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """What one plan drew. work: density and density_all, as row entries."""

    pictures: np.ndarray
    tokens: list[list[np.ndarray]]
    work: dict[str, Any]


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


class Drawing:
    """Draws a fixed list of prompts with any plan, in batches, and counts kept work on the way."""

    def __init__(self, pipe: Pipeline, prompts: list[str], batch: int, seed: int, **shape: Any):
        self.pipe = pipe
        self.schedule = resolve_schedule(pipe.model, **shape)
        leaves, treedef = jax.tree.flatten(pipe.model.tokenizer)
        decode = jax.jit(
            lambda leaves, codes: bsq_vae.to_uint8(
                jax.tree.unflatten(treedef, leaves).decode(codes)
            )
        )
        self._decode = lambda codes: decode(leaves, codes)
        dense = self.plan("dense")
        self.requests = [
            pipe.request(prompts[start : start + batch], plan=dense, seed=seed + start)
            for start in range(0, len(prompts), batch)
        ]

    def plan(self, text: str) -> Plan:
        """A plan by its text, with the model's guidance; "dense/xla" uses plain XLA attention."""
        name, _, implementation = text.partition("/")
        plan = resolve_plan(self.pipe.model, name, self.schedule)
        return with_implementation(plan, implementation) if implementation else plan

    def compile(self, plan: Plan) -> None:
        """Compile all steps of a plan; plans share those that are equal."""
        for request in {request.keys.shape[0]: request for request in self.requests}.values():
            self.pipe.generator.compile(plan, request.condition, request.keys.shape[0])

    def draw(self, plan: Plan) -> Drawn:
        """Pictures of all prompts, tokens of every scale by batch, and the work they took."""
        pictures, tokens, pairs = [], [], []
        for request in self.requests:
            kept = Kept(plan)
            outputs, code_sum = [], None
            steps = self.pipe.generator.steps(
                plan, request.condition, request.controls, request.keys
            )
            for index, (state, output) in enumerate(steps):
                kept.after(index, state.strategies)
                outputs.append(np.asarray(output.tokens))
                code_sum = state.code_sum
            pictures.append(np.asarray(self._decode(code_sum)))
            tokens.append(outputs)
            pairs.append(kept.density())
        density, density_all = np.mean(pairs, 0).tolist()
        work = {"density": density, "density_all": density_all}
        return Drawn(np.concatenate(pictures), tokens, work)

    def seconds(self, plan: Plan) -> dict[str, Any]:
        """Warm seconds of the last batch by scale, the device waited for after every one."""
        request, spent = self.requests[-1], []
        before = time.perf_counter()
        for state, _ in self.pipe.generator.steps(
            plan, request.condition, request.controls, request.keys
        ):
            jax.block_until_ready(state)
            spent.append(time.perf_counter() - before)
            before = time.perf_counter()
        return {"seconds": sum(spent), "seconds_by_scale": spent}


class Kept:
    """Kept pairs of a running plan: counted from the layer states where they depend on the data."""

    def __init__(self, plan: Plan):
        self.plan = plan
        self.pairs = {
            (index, layer): step.segment(layer).attention.pairs(plan.place(index))
            for index, step in enumerate(plan.steps)
            for layer in range(plan.depth)
        }

    def after(self, index: int, states: tuple[dict[str, jax.Array], ...]) -> None:
        """Count the next step's pairs from the state that step `index` left."""
        if index + 1 == len(self.plan.steps):
            return
        step = self.plan.steps[index + 1]
        for layer, state in enumerate(states):
            attention: Any = step.segment(layer).attention
            if hasattr(attention, "kept"):
                pairs = _kept(state, attention=attention, place=self.plan.place(index + 1))
                self.pairs[index + 1, layer] = float(pairs)

    def density(self) -> tuple[float, float]:
        """Kept over dense pairs, in the last three scales and in all; see `Plan.density`."""
        plan, scales = self.plan, self.plan.schedule.scales
        rows = {"both": 2, "cond": 1}
        found = []
        for first in (len(scales) - LAST_SCALES, 0):
            dense = sum(scale.tokens * scale.end for scale in scales[first:]) * plan.depth
            kept = sum(
                pairs * rows[plan.steps[index].rows]
                for (index, _), pairs in self.pairs.items()
                if plan.steps[index].scale.index >= first
            )
            found.append(kept / (dense * rows[plan.steps[0].rows]))
        return found[0], found[1]


def _kept_pairs(state, *, attention, place):
    return attention.kept(state, place)


_kept = jax.jit(_kept_pairs, static_argnames=("attention", "place"))


def box_weights(pictures: np.ndarray, kinds: list[str]) -> np.ndarray:
    """Ones inside the object's box of single things, zeros elsewhere, [B, height, width]."""
    weights = np.zeros(pictures.shape[:3], np.float32)
    for weight, picture, kind in zip(weights, pictures, kinds, strict=True):
        if kind == "single":
            weight[object_box(picture / 255.0)] = 1
    return weights


def picture_measures(
    weights: features.Parameters | None,
) -> Callable[[np.ndarray, np.ndarray, np.ndarray], Measured]:
    """A function of (dense, sparse, where) that returns one value a picture and measure."""

    @jax.jit
    def measure(a, b, where):
        a, b = a.astype(jnp.float32) / 255, b.astype(jnp.float32) / 255
        found = {"psnr": psnr(a, b, where), "ssim": ssim(a, b, where)}
        if min(a.shape[1:3]) >= SMALLEST_SIDE:
            found["ms_ssim"] = ms_ssim(a, b, where)
        if weights is not None:
            found["distance"] = features.distance(weights, a, b, where)
        return found

    def in_pieces(a: np.ndarray, b: np.ndarray, where: np.ndarray) -> Measured:
        pieces = [
            measure(a[i : i + 8], b[i : i + 8], where[i : i + 8]) for i in range(0, len(a), 8)
        ]
        return {name: np.concatenate([p[name] for p in pieces]) for name in pieces[0]}

    return in_pieces


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


def measure_plans(
    drawing: Drawing,
    kinds: list[str],
    names: list[str],
    *,
    teacher: int,
    sheets: list[str],
    budget: float,
    write: Callable[[list[dict[str, Any]]], None],
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """(rows of all plans, pictures of the plans that get a sheet).

    `write` gets all rows so far, after every plan. Later plans compile while earlier ones draw, so
    seconds are measured at the end, when nothing else runs. Plans that are not compiled within
    `budget` seconds are left out, and said to be.
    """
    start = time.perf_counter()
    dense_plan = drawing.plan("dense")
    plans = {name: drawing.plan(name) for name in dict.fromkeys(names) if name != "dense"}
    drawing.compile(dense_plan)
    measure = picture_measures(features.load())
    reference = drawing.draw(dense_plan)
    dense, work = reference.pictures, reference.work
    whole, boxes = np.ones(dense.shape[:3], np.float32), box_weights(dense, kinds)
    rows = [dense_row(kind, kinds.count(kind), work) for kind in dict.fromkeys(kinds)]
    if boxes.any():
        rows.append(dense_row("boxes", int(boxes.any((1, 2)).sum()), work))
    kept, drawn_plans = {"dense": dense}, {"dense": dense_plan}
    compared = LogitComparison(drawing, reference.tokens[0], teacher)

    def prepare(plan: Plan) -> dict[str, Any]:
        drawing.compile(plan)
        return compared.figures(plan)

    pool = ThreadPoolExecutor(COMPILING_PLANS)
    prepared = {name: pool.submit(prepare, plan) for name, plan in plans.items()}
    for name, plan in plans.items():
        left = max(budget - (time.perf_counter() - start), 0)
        try:
            logits = prepared[name].result(None if math.isinf(left) else left)
        except TimeoutError:
            print(f"left out for time: {name}", flush=True)
            continue
        drawn = drawing.draw(plan)
        drawn_plans[name] = plan
        if name in sheets:
            kept[name] = drawn.pictures
        full = measure(dense, drawn.pictures, whole)
        values = {
            kind: (np.array([k == kind for k in kinds]), full) for kind in dict.fromkeys(kinds)
        }
        if boxes.any():
            values["boxes"] = (boxes.any((1, 2)), measure(dense, drawn.pictures, boxes))
        new = rows_of(name, drawn.work, values, logits)
        rows += new
        write(rows)
        print(f"{time.perf_counter() - start:.0f} s {quality_report.line(new)}", flush=True)
    pool.shutdown(cancel_futures=True)
    times = {name: drawing.seconds(plan) for name, plan in drawn_plans.items()}
    return [{**row, **times[row["plan"]]} for row in rows], kept


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
    parser.add_argument("--out", default=None, help="folder, default benchmarks/results/DEVICE")
    arguments = parser.parse_args()
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

    rows, pictures = measure_plans(
        drawing,
        kinds,
        arguments.plans,
        teacher=arguments.teacher,
        sheets=arguments.sheets,
        budget=arguments.budget_seconds,
        write=write,
    )
    file = write(rows)
    quality_report.write(file, rows, pictures, kinds)
    print(f"wrote {file}")


if __name__ == "__main__":
    main()
