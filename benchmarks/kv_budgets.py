"""What key/value caches keep and what that costs, ours beside the budgets that others published.

    python -m benchmarks.kv_budgets --size 0.25M --write

The demo model, or one of `--model`, draws the same prompts and seeds with plans and caches. Told
are PSNR and SSIM against its own dense pictures, the cache that the same plan takes in Infinity 2B
and 8B for one picture of 1024x1024 in bfloat16 (from shapes, as `sparvar info` counts), and the
time of 8B on an H100 where a results file has it. Claims of others stand in rows of their own,
with their source: their pictures, cards and batches are not ours. `--write` keeps every row in
`kv-budgets.json` as soon as it is there.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _record as record
from benchmarks._options import parser_of
from benchmarks.cache_error import PROMPTS
from sparvar_jax.cli import console
from sparvar_jax.models.infinity_parts import InfinityConfig
from sparvar_jax.pipelines.memory import cache_bytes
from sparvar_jax.pipelines.pipeline import Pipeline
from sparvar_jax.plans.caches import with_cache
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.plans.stores import CacheShape
from sparvar_jax.policies import parse_plan
from sparvar_jax.policies.head_orders import write_orders
from sparvar_jax.study import head_order
from sparvar_jax.study.picture_metrics import psnr, ssim

MORE_PROMPTS = (
    "a blue house under a white cloud",
    "a green triangle to the right of a yellow circle",
    "an orange fish on a dark blue background",
    "a black umbrella above a brown dog",
)
ORDER_PROMPTS = ("a purple heart", "a tree to the left of a red car")
"""What head orders are measured on: none of the prompts that are compared."""
RELEASED = {"infinity_2b": "2b", "infinity_8b": "8b"}
GIB = 1 << 30
KEY = ("method", "cache", "source")

Row = dict[str, Any]


class Kept(NamedTuple):
    """A plan, as text with a model's own {order} of heads and {preset}, and a kind of cache."""

    plan: str
    cache: str = "full"


KEPT = (
    Kept("dense"),
    Kept("dense", "lean"),
    Kept("dense", "int8"),
    Kept("scalekv('{preset}')"),
    Kept("scalekv(keep=0.1)"),
    Kept("per_head('{order}', 0.1)"),
    Kept("sparvar-fast", "lean"),
    Kept("sparvar-fast", "int8"),
    Kept("per_head('{order}', 0.5)"),
    Kept("per_head('{order}', 0.2)"),
    Kept("scalekv(keep=0.2)"),
    Kept("scalekv(keep=0.5)"),
)
CLAIMED: tuple[Row, ...] = (
    {
        "method": "ScaleKV, 8B at 10 %",
        "source": "arXiv 2505.19602",
        "claim": "all memory 31.4 to 21.4 GB at one picture; PSNR 23.25 dB on COCO prompts",
    },
    {
        "method": "ScaleKV, 2B at 10 %",
        "source": "arXiv 2505.19602",
        "claim": "PSNR 22.64 dB on COCO prompts",
    },
    {
        "method": "ScaleKV, 8B, as SparVAR's authors measured it",
        "source": "arXiv 2602.04361",
        "claim": "0.67 times the speed of dense; PSNR 23.4 dB, SSIM 0.80",
    },
    {
        "method": "HeatKV, 8B at 5 %",
        "source": "arXiv 2605.14877",
        "claim": "cache 42 to 2.1 GB at their batch; no latency claimed at one picture",
    },
    {
        "method": "HACK++, 8B: 30 % read, 10 % kept",
        "source": "arXiv 2606.08302",
        "claim": "cache 16.9 to 1.7 GB at their batch; 1.52 times their baseline's throughput",
    },
)
"""What was published, in words: other prompts, cards and batches do not belong in one column with
ours, and none of it was measured here."""


def plan_of(kept: Kept, schedule: ScaleSchedule, depth: int, order: Any, preset: str) -> Plan:
    """The plan of a row for one model."""
    text = kept.plan.format(order=order, preset=preset)
    return with_cache(parse_plan(text, schedule, depth), kept.cache)


@functools.cache
def released_cache(kept: Kept, model: str) -> int:
    """Bytes of the cache of one guided picture of 1024x1024 of a released model, in bfloat16."""
    config = InfinityConfig.preset(model)
    plan = plan_of(kept, infinity_schedule(1.0, "1M"), config.depth, model, RELEASED[model])
    shape = CacheShape(plan.row_factor, config.heads, config.head_dim, jnp.dtype("bfloat16"))
    return cache_bytes(plan, shape)


def seconds_8b(kept: Kept, folder: Path = record.RESULTS / "h100") -> Row | None:
    """Seconds a picture of the 8B from the results of an H100, of the fewest pictures together."""
    found = []
    for name in ("generate-throughput", "generate-latency"):
        file = folder / f"{name}.json"
        for row in json.loads(file.read_text())["rows"] if file.is_file() else ():
            asked = row["model"], row["plan"], row.get("cache", "full")
            plain = not (row.get("matrices") or row.get("path") or row["text"] != "features")
            if asked == ("infinity_8b", *kept) and plain and row.get("seconds_median"):
                found.append((row["batch"], row["seconds_median"] / row["batch"], file.stem))
    if not found:
        return None
    batch, seconds, name = min(found, key=lambda row: row[0])
    return {"seconds": seconds, "batch": batch, "file": name}


class Pictures:
    """One model's pictures of fixed prompts, drawn with any plan."""

    def __init__(self, pipe: Pipeline, prompts: tuple[str, ...], size: str, order: Path):
        self.pipe, self.order = pipe, order
        self.request = pipe.request(list(prompts), plan="dense", size=size, seed=0)
        orders = head_order.measure(pipe, ORDER_PROMPTS, size=size)
        write_orders(order, orders, "benchmarks.kv_budgets")

    def draw(self, kept: Kept) -> np.ndarray:
        """The pictures, uint8."""
        request, schedule = self.request, self.request.plan.schedule
        plan = plan_of(kept, schedule, request.plan.depth, self.order, "2b")
        code_sum, _ = self.pipe.generator.run(
            plan, request.condition, request.controls, request.keys
        )
        self.pipe.generator.release()
        return np.asarray(self.pipe.decode(code_sum))


def likeness(pictures: np.ndarray, dense: np.ndarray) -> Row:
    """How near pictures are to dense ones: means, and how many are the same bit for bit."""
    ours, theirs = (jnp.asarray(x, jnp.float32) / 255 for x in (pictures, dense))
    whole = jnp.ones(ours.shape[:3])
    return {
        "psnr": float(psnr(ours, theirs, whole).mean()),
        "ssim": float(ssim(ours, theirs, whole).mean()),
        "same": int(np.sum((pictures == dense).all((1, 2, 3)))),
        "pictures": len(pictures),
    }


def row_of(kept: Kept, near: Row) -> Row:
    """Everything told of one plan and cache."""
    row: Row = {"method": kept.plan.format(order="ORDER", preset="PRESET"), "cache": kept.cache}
    row["source"] = "here"
    for model in RELEASED:
        row[f"{model}_gib"] = released_cache(kept, model) / GIB
        row[f"{model}_share"] = released_cache(kept, model) / released_cache(KEPT[0], model)
    return row | near | {"h100": seconds_8b(kept)}


def line(row: Row) -> str:
    """One row in one line of text."""
    caches = ", ".join(f"{model} {row[f'{model}_gib']:.2f} GiB" for model in RELEASED)
    return (
        f"{row['method']}, {row['cache']}: {caches}; PSNR {row['psnr']:.2f} dB, SSIM "
        f"{row['ssim']:.4f}, {row['same']} of {row['pictures']} the same"
    )


def main(arguments: list[str] | None = None) -> None:
    """Draw every plan, print its row, and keep it."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", type=Path, help="model directory, by default the demo model")
    parser.add_argument("--size", default="0.25M")
    parser.add_argument("--write", action="store_true", help="keep it in benchmarks/results")
    asked = parser.parse_args(arguments)
    console.use_compilation_cache()
    pipe = Pipeline.from_checkpoint(asked.model, dtype="float32", cache="full")
    with tempfile.TemporaryDirectory() as folder:
        order = Path(folder) / "order.json"
        pictures = Pictures(pipe, PROMPTS + MORE_PROMPTS, asked.size, order)
        dense = pictures.draw(KEPT[0])
        for kept in KEPT:
            near = likeness(dense if kept == KEPT[0] else pictures.draw(kept), dense)
            row = {"model": pipe.model.name, "size": asked.size, **row_of(kept, near)}
            print(line(row), flush=True)
            jax.clear_caches()
            if asked.write:
                record.add("kv-budgets", row, key=KEY)
    for row in CLAIMED if asked.write else ():
        record.add("kv-budgets", row, key=KEY)


if __name__ == "__main__":
    main()
