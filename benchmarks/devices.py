"""Seconds of whole generations on several GPUs of one host, beside one of them in the same call.

    python -m benchmarks.devices --model infinity_8b --plans dense sparvar-fast
    python -m benchmarks.devices --pictures 4 --plans dense

The devices draw `--pictures` pictures: rows of the mesh take whole pictures; of what is left, two
take conditional and unconditional rows apart where a plan allows (not with `--no-part-guidance`),
and the rest divides heads and tokens. One device draws what each row of the mesh draws. Every row
is in `generate-devices.json` as soon as it is measured: mesh, seconds, images a second beside one
device, seconds in collectives, and a check.

The check lays the states of one device, before the first divided scale and before the last, out on
the mesh, runs the timed programs from there, and compares what they leave behind: keys and values
of every layer, and tokens.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from benchmarks import _record as record
from benchmarks import generate_check, models, tolerances
from benchmarks._options import add_out, parser_of
from benchmarks._trace import kernel_times
from benchmarks.generate_bench import Bench, measure
from benchmarks.models import Parts
from sparvar_jax.cli import console
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime.devices import Devices
from sparvar_jax.runtime.placement import Placement
from sparvar_jax.runtime.state import State

KEY = ("model", "plan", "devices", "mesh", "pictures", "size", "matrices")
COLLECTIVE = ("nccl", "all-to-all", "all-gather", "AllToAll", "AllGather", "SendRecv")

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The same pictures on one device and, once for every row of the mesh, on many."""

    one: Bench
    many: Bench

    def placement(self, plan: Plan) -> Placement:
        """The mesh that draws a plan."""
        found = self.many.generator.place(self.many.batch, plan)
        assert found is not None
        return found

    @classmethod
    def of(cls, parts: Parts, devices: Devices, pictures: int, size: str | None) -> Pair:
        """Benches for so many pictures on the devices, and for a row's pictures on one."""
        rows = devices.by_pictures(pictures).row_parts
        each, config = pictures // rows, parts.transformer.config
        text: Any = None
        if parts.begins_with_text:
            text = models.prefix_features(each, config)
        elif not parts.draws_classes:
            text = models.text_features(each, config.text_width, config.text_max_length)
        one = Bench(parts, each, size, text)
        tiled = text and type(text)(*(np.concatenate([part] * rows) for part in text))
        many = Bench(_spread(parts, devices), pictures, size, tiled, placement=devices)
        many.keys = jnp.concatenate([one.keys] * rows)
        return cls(one, many)

    def compile(self, plans: list[Plan]) -> float:
        """Compile all that both run, at once; returns the seconds."""
        before = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            for running in [pool.submit(bench.compile, plans) for bench in (self.one, self.many)]:
                running.result()
        return time.perf_counter() - before


def _spread(parts: Parts, devices: Devices) -> Parts:
    """The same weights on all devices."""

    def everywhere(module: Any) -> Any:
        graph, state = nnx.split(module)
        return nnx.merge(graph, devices.put_parameters(state))

    placed = {name: everywhere(getattr(parts, name)) for name in ("transformer", "tokenizer")}
    return dataclasses.replace(parts, **placed)


def check(pair: Pair, plan: Plan) -> Row:
    """How far the mesh's programs are from one device's, from the same states."""
    placement, found = pair.placement(plan), {}
    divided = divided_from(pair, plan)
    wanted = {len(plan.steps) - 1} | ({divided} if divided is not None else set())
    one, many = pair.one, pair.many
    programs = many.programs(plan)
    steps, parameters = many.generator.current(many.batch, plan)
    condition, controls, keys = steps.placed(many.condition(), many.setting.controls, many.keys)
    laid_out: State | None = None
    for index, (state, output) in enumerate(one.steps(plan, one.condition())):
        if laid_out is not None:
            after, drawn = steps.run(
                programs[index], parameters, condition, laid_out, controls, keys
            )
            found[index] = _compare(state, output, after, drawn, plan, index)
        following = index + 1
        laid_out = _lay_out(state, placement) if following in wanted else None
    worst = max(entry["cache_error"] for entry in found.values())
    agreement = min(entry["token_agreement"] for entry in found.values())
    allowed = tolerances.tolerance(one.parts)
    problem = None
    if not worst <= allowed.cache:
        problem = f"keys and values differ from one device by {worst:.3g}"
    elif not agreement >= 1 - allowed.tokens:
        problem = f"only {agreement:.3f} of the tokens equal those of one device"
    scales = {str(index): entry for index, entry in found.items()}
    return {"problem": problem, "scales": scales, "tolerance": dataclasses.asdict(allowed)}


def _lay_out(state: State, placement: Placement) -> State:
    """A copy of one device's state on the mesh, once for every row of it."""
    rows = placement.row_parts

    def tiled(leaf: Any) -> Any:
        shape = (rows * leaf.shape[0], *leaf.shape[1:])
        return jax.ShapeDtypeStruct(shape, leaf.dtype)

    shapes = placement.state(jax.tree.map(tiled, state))

    def put(leaf: jax.Array, shape: Any) -> jax.Array:
        sharding: NamedSharding = shape.sharding
        pieces = []
        for device, index in sharding.addressable_devices_indices_map(shape.shape).items():
            piece = _own(leaf, shape.shape[0], index) if index is not None else leaf
            pieces.append(jax.device_put(piece, device, may_alias=False))
        return jax.make_array_from_single_device_arrays(shape.shape, sharding, pieces)

    return jax.tree.map(put, state, shapes)


def _own(leaf: jax.Array, rows: int, index: tuple[slice, ...]) -> jax.Array:
    """A device's part of what one device has: its rows of one picture's, and its heads."""
    first, last, _ = index[0].indices(rows)
    piece = leaf[first % len(leaf) : first % len(leaf) + last - first]
    return piece[:, index[1]] if leaf.ndim > 1 else piece


def _compare(state: State, output: Any, after: State, drawn: Any, plan: Plan, index: int) -> Row:
    """Relative errors of the rows a scale wrote, and the share of equal tokens."""
    errors, batch = [], len(output.tokens)
    for layer, (ours, theirs) in enumerate(zip(after.cache, state.cache, strict=True)):
        rows = plan.place(index, layer).rows.rows(index)
        live = batch * plan.steps[index].row_factor
        for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            errors.append(_relative(np.asarray(x[:live, :, rows]), np.asarray(y[:live, :, rows])))
    same = generate_check.agreement(jnp.asarray(np.asarray(drawn.tokens)[:batch]), output.tokens)
    return {"cache_error": max(errors), "token_agreement": same}


def _relative(ours: np.ndarray, theirs: np.ndarray) -> float:
    ours, theirs = ours.astype(np.float32), theirs.astype(np.float32)
    return float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs))


def divided_from(pair: Pair, plan: Plan) -> int | None:
    """The first scale whose tokens are divided, None if none are."""
    model, batch, placement = pair.many.parts.transformer, pair.many.batch, pair.placement(plan)
    for index, step in enumerate(plan.steps):
        rows = batch * step.row_factor
        if placement.divides(model, step.scale.tokens, rows):
            return index
    return None


def measure_pair(pair: Pair, plan: Plan, repeats: int, trace: bool) -> Row:
    """Everything measured of one plan on one device and on the mesh."""
    one = measure(pair.one, plan, repeats)
    pair.one.release(plan)
    many = measure(pair.many, plan, repeats)
    row: Row = {
        "plan": plan.name,
        "mesh": "x".join(map(str, pair.placement(plan).mesh.devices.shape)),
        "seconds_median": many["seconds_median"],
        "images_per_second": many["images_per_second"],
        "one_device": one,
        "speedup": many["images_per_second"] / one["images_per_second"],
        "many": many,
        "divided_from": divided_from(pair, plan),
    }
    if trace:
        table = kernel_times(functools.partial(pair.many.draw, plan))
        devices = pair.placement(plan).mesh.size
        together = [name for name in table if any(word in name for word in COLLECTIVE)]
        row["seconds_in_collectives"] = sum(table[n]["ms"] for n in together) / devices / 1e3
        row["kernel_ms"] = dict(itertools.islice(table.items(), 40))
    return row


def line(row: Row) -> str:
    """One row in one line of text."""
    head = f"{row['model']} x{row['pictures']} on {row['devices']} ({row['mesh']}) {row['plan']}"
    checked = row.get("check", {})
    return (
        f"{head}: {row['seconds_median']:.4f} s, one device "
        f"{row['one_device']['seconds_median']:.4f} s, images a second x{row['speedup']:.2f}, "
        f"collectives {row.get('seconds_in_collectives', float('nan')):.4f} s, divided from scale "
        f"{row['divided_from']}; compile {row['compile_seconds']:.0f} s; check {checked}"
    )


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The options of the command."""
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="infinity_8b", help="released shape or directory")
    parser.add_argument("--plans", nargs="+", default=["dense", "sparvar-fast"])
    parser.add_argument("--devices", type=int, help="how many; all by default")
    parser.add_argument("--pictures", type=int, nargs="+", default=[1], help="of all devices")
    parser.add_argument("--size", help="0.25M is 512 px, 1M 1024")
    parser.add_argument("--divide-from", type=int, help="tokens of a scale; else the cost model")
    parser.add_argument("--part-guidance", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"))
    parser.add_argument("--matrices", choices=("dense", "int8", "fp8"), default="dense")
    parser.add_argument("--trace", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--check", action=argparse.BooleanOptionalAction, default=True)
    add_out(parser)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    """Measure; exit 1 where a check failed."""
    asked = parse(arguments)
    console.use_compilation_cache()
    found = jax.devices()[: asked.devices]
    devices = Devices(tuple(found), asked.divide_from, asked.part_guidance)
    parts = models.build(asked.model, dtype=asked.dtype, matrices=asked.matrices)
    form = {} if asked.matrices == "dense" else {"matrices": asked.matrices}
    problems = []
    for pictures in asked.pictures:
        pair = Pair.of(parts, devices, pictures, asked.size)
        plans = [pair.many.plan(name) for name in asked.plans]
        base = {"model": parts.name, "devices": len(found), "pictures": pictures}
        base |= {"size": asked.size or parts.size, "compile_seconds": pair.compile(plans)} | form
        for plan in plans:
            row = base | measure_pair(pair, plan, asked.repeats, asked.trace)
            record.add("generate-devices", row, key=KEY, folder=asked.out)
            print(line(row), flush=True)
            if asked.check:
                row["check"] = check(pair, plan)
                record.add("generate-devices", row, key=KEY, folder=asked.out)
                print(line(row), flush=True)
                problems += [row["check"]["problem"]] if row["check"]["problem"] else []
            for name, spent in list(row.get("kernel_ms", {}).items())[:24]:
                print(f"  {spent['ms']:9.2f} ms  {spent['launches']:6d}x  {name[:100]}", flush=True)
            pair.many.release(plan)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)


if __name__ == "__main__":
    main()
