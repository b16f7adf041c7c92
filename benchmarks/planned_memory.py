"""GiB that XLA lays out for whole generations on an H100 that is not here, beside the estimate.

    python -m benchmarks.planned_memory            # pip install -e '.[assemble]', no GPU; a while
    python -m benchmarks.planned_memory --cases '*2b*'

Every step of a plan is compiled for a described device, as `benchmarks.assemble` does for kernels;
the largest step's inputs, outputs and temporaries lie beside the weights. The decoder's maps, and
the estimate as a whole, are what `sparvar info` tells. Writes `benchmarks/results/planned.json`;
exits 1 where the two are more than 5 % apart.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import importlib.util
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from benchmarks import _record as record
from benchmarks import models
from benchmarks._options import parser_of
from benchmarks.described import Described
from benchmarks.generate_stats import GIB, program_bytes, tree_bytes
from benchmarks.gpus import GPUS
from sparvar_jax.models import eight_bits
from sparvar_jax.models.bsq_vae import BsqVae, BsqVaeConfig
from sparvar_jax.models.infinity import Infinity, InfinityConfig
from sparvar_jax.models.t5 import T5Encoder
from sparvar_jax.models.text_tokens import Tokenizer
from sparvar_jax.pipelines.family import family_of
from sparvar_jax.pipelines.loading import Model
from sparvar_jax.pipelines.memory import Estimate, estimate
from sparvar_jax.plans.caches import Cache, with_cache
from sparvar_jax.plans.plan import Plan
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import parse_plan
from sparvar_jax.runtime.generate import controls
from sparvar_jax.runtime.state import empty_state
from sparvar_jax.runtime.steps import Steps

FAMILY = "9.0"
OFF = 0.05
"""How far an estimate may be from what XLA lays out, as a share of it."""
COMPILED = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}
"""As `runtime.compiling` has it; without a device nothing can be tried out."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A generation of pictures of 1024x1024 in bfloat16, text encoder freed."""

    model: str
    batch: int
    cache: Cache
    plan: str = "dense"
    matrices: Any = "dense"

    @property
    def name(self) -> str:
        return f"{self.model} x{self.batch} {self.plan} {self.cache} {self.matrices}"


CASES = (
    *(Case("infinity_8b", 1, cache) for cache in ("full", "lean", "int8")),
    Case("infinity_8b", 1, "full", "sparvar-fast"),
    Case("infinity_8b", 1, "full", "sparvar-fast", "int8"),
    Case("infinity_8b", 1, "int8", "dense", "int8"),
    Case("infinity_8b", 1, "int8", "sparvar-fast", "int8"),
    Case("infinity_8b", 4, "lean"),
    Case("infinity_8b", 8, "int8"),
    Case("infinity_8b", 8, "int8", "sparvar-fast"),
    Case("infinity_2b", 16, "lean"),
    Case("infinity_2b", 16, "lean", "sparvar-fast"),
)  # fmt: skip


@functools.cache
def described_model(name: str, matrices: Any) -> Model:
    """The parts of a released shape as shapes, with the text encoder of released models."""
    text = dataclasses.replace(models.T5_XL, dtype="bfloat16")
    codes = BsqVaeConfig.preset(models.TOKENIZERS.get(name, "f16_d32"))
    kinds: Any = ((Infinity, InfinityConfig.preset(name)), (BsqVae, codes))
    transformer, tokenizer = (
        models.abstract(kind, dataclasses.replace(config, dtype="bfloat16"))
        for kind, config in kinds
    )
    if matrices != "dense":
        eight_bits.narrow(transformer, eight_bits.kernels(transformer, matrices))
    pieces = list(range(2, models.TEXT_TOKENS + 1))
    return Model(
        family_of({"transformer": {"kind": "infinity"}}),
        transformer,
        tokenizer,
        models.abstract(T5Encoder, text),
        Tokenizer(Path("made up"), text.vocab, lambda prompt: pieces),
    )


def laid_out(model: Model, plan: Plan, batch: int, device: Described) -> int:
    """Most bytes that a step takes besides weights: arguments, results and temporaries."""
    transformer = model.transformer
    steps, config = Steps((transformer, None)), transformer.config
    steps._shapes = device.put(steps._shapes)
    text = jax.eval_shape(lambda: models.text_features(batch, config.text_width, 512))
    condition = jax.eval_shape(_embed, transformer, *text)
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch))
    state = jax.eval_shape(lambda: empty_state(transformer, plan, batch))
    lowered = []
    with jax.sharding.use_abstract_mesh(device.mesh.abstract_mesh):
        for index in range(len(plan.steps)):
            inputs = steps._inputs(condition, controls(len(plan.schedule)), keys, None)
            traced = steps._trace(steps.spec(plan, index), device.put(inputs), device.put(state))
            lowered.append(traced.lower(lowering_platforms=("cuda",)))
            state = jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), traced.out_info[0]
            )
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = pool.map(lambda one: one.compile(COMPILED), lowered)
        return max(tree_bytes(p.args_info[0][1:]) + program_bytes(p) for p in programs)


def _embed(transformer: Any, *text: Any) -> Any:
    return transformer.embed_condition(*text, "learned")


def planned(case: Case) -> tuple[Model, Plan, Estimate]:
    """The model and the plan of a case, and what is estimated of them."""
    model = described_model(case.model, case.matrices)
    schedule = infinity_schedule(1.0, "1M")
    guidance = (True,) * len(schedule)
    depth = model.transformer.config.depth
    plan = with_cache(parse_plan(case.plan, schedule, depth, guidance=guidance), case.cache)
    return model, plan, estimate(model, plan, case.batch)


def measure(case: Case, device: Described) -> dict[str, Any]:
    """A row: what XLA lays out and what is estimated, in GiB."""
    model, plan, told = planned(case)
    weights = told.weights["transformer"] + told.weights["tokenizer"]
    steps = laid_out(model, plan, case.batch, device)
    peak = weights + max(steps, told.cache + told.decode)
    return {
        **dataclasses.asdict(case),
        "planned_gib": {
            "weights": weights / GIB, "cache": told.cache / GIB, "peak": peak / GIB,
        },
        "steps_gib": steps / GIB,
        "estimated_gib": told.peak_text_freed / GIB,
        "off": (told.peak_text_freed - peak) / peak,
    }  # fmt: skip


def write(rows: list[dict[str, Any]], folder: Path) -> None:
    """The rows, in place of those of the same cases; others stay, each with its own commit."""
    file, header = folder / "planned.json", record.describe()
    rows = [row | {"commit": header["commit"]} for row in rows]
    names = {case_of(row).name for row in rows}
    kept = json.loads(file.read_text())["rows"] if file.exists() else []
    rows = [*(row for row in kept if case_of(row).name not in names), *rows]
    order = [case.name for case in CASES]
    rows.sort(key=lambda row: order.index(case_of(row).name))
    header["device"] = f"{GPUS[FAMILY].kind}, described, not run"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({**header, "rows": rows}, indent=1) + "\n")


def case_of(row: dict[str, Any]) -> Case:
    """The case that a row of the file is of."""
    return Case(**{field.name: row[field.name] for field in dataclasses.fields(Case)})


def main() -> int:
    """Compile the cases asked for, show each, and write it."""
    parser = parser_of(__doc__)
    parser.add_argument("--cases", nargs="+", default=["*"], help="shell patterns of case names")
    parser.add_argument("--out", type=Path, default=record.RESULTS, help="folder")
    asked = parser.parse_args()
    if importlib.util.find_spec("jax_plugins") is None:
        parser.error("this needs jax's CUDA plugin: pip install -e '.[assemble]'")
    device, wrong = Described(GPUS[FAMILY]), 0
    for case in CASES:
        if not any(fnmatch.fnmatch(case.name, pattern) for pattern in asked.cases):
            continue
        row = measure(case, device)
        write([row], asked.out)
        wrong += abs(row["off"]) > OFF
        told, peak = row["estimated_gib"], row["planned_gib"]["peak"]
        print(f"{case.name}: {peak:.2f} GiB, estimated {told:.2f} ({row['off']:+.1%})", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
