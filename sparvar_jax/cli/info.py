"""`sparvar info`: what a model directory holds and what drawing with it takes."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from sparvar_jax.cli import console, options
from sparvar_jax.weights.told import told

_GIB = 1 << 30


def info(
    model: options.Model = None,
    plan: options.Plan = None,
    num: options.Num = 1,
    aspect: options.Aspect = None,
    size: options.Size = None,
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
    cache: options.CacheKind = options.Cache.full,
    devices: options.Devices = None,
) -> None:
    """Show a model's parts, its plan scale by scale, and an estimate of device memory."""
    from sparvar_jax.pipelines import loading
    from sparvar_jax.pipelines.memory import estimate
    from sparvar_jax.plans.caches import with_cache
    from sparvar_jax.study import kernels

    folder = loading.model_folder(model)
    precision = loading.compute_dtype(options.name_of(dtype))
    described = loading.describe_model(
        folder, precision, options.form_of(weights), options.name_of(stream)
    )
    if described.family.draws == "classes":
        options.refuse(folder, aspect=aspect, size=size)
    asked = options.given(plan=plan, aspect_ratio=aspect, size=size)
    chosen, _ = described.family.asked(described.name, asked).resolve(described)
    chosen = with_cache(chosen, cache.value)
    parts = _mesh(described, chosen, devices, num)
    # A device with one row of a picture holds as much as one with half the heads of both.
    needed = estimate(described, chosen, num, (parts[0], parts[1] * parts[2]))

    height, width = (side * described.stride for side in chosen.schedule.final)
    console.say(f"model {folder}: pictures of {width}x{height}")
    console.output.print(_parts(folder, described, needed.weights))
    console.say(f"\ndefaults {described.defaults}")
    console.say(f"\nplan {chosen.name}")
    console.say(chosen.describe())
    transformer = described.parts["transformer"]
    console.say(f"\nkernels {kernels.told(chosen, transformer.config, num)}")
    if math.prod(parts) > 1:
        console.say(_split(described, chosen, num, parts))
    console.say(
        f"\nmemory of a batch of {num}, estimated: weights {_gib(sum(needed.weights.values()))}, "
        f"{cache.value} cache {_gib(needed.cache)}, {described.family.draws} "
        f"{_gib(needed.condition)}, largest step {_gib(needed.step)}, "
        f"decoding {_gib(needed.decode)}; peak about {_gib(needed.peak)}"
    )
    if "text" in needed.weights:
        freed = _gib(needed.peak_text_freed)
        console.say(f"with --free-text-encoder: peak about {freed}")


def _mesh(described: Any, plan: Any, devices: str | None, num: int) -> tuple[int, int, int]:
    """`split.shape`, whose devices need not be here if a number of them is asked for."""
    import jax

    from sparvar_jax.runtime import split
    from sparvar_jax.runtime.devices import count_of

    heads = described.transformer.config.heads
    found = len(jax.local_devices())
    if devices is not None and devices.isascii() and devices.isdigit() and len(devices) < 5:
        found = max(found, int(devices))
    return split.shape(count_of(devices, found, heads), num, heads, plan)


def _split(described: Any, plan: Any, num: int, parts: tuple[int, int, int]) -> str:
    """How the work is divided, and what the cost model makes of it."""
    from sparvar_jax.runtime import split

    told = split.forecast(described.transformer, plan, num, parts)
    where = "nowhere" if told.divided_from is None else f"from scale {told.divided_from} on"
    rows, guidance, heads = parts
    return (
        f"\n{math.prod(parts)} devices: pictures over {rows}, guidance over {guidance}, heads over "
        f"{heads}; tokens divided {where}; products of the blocks about {told.one:.3g} s on one "
        f"H100, {told.many:.3g} s on these; memory below is that of one device"
    )


def _parts(folder: Path, described: Any, weights: dict[str, int]) -> Table:
    """One line a part: kind, size and where it came from."""
    from sparvar_jax.models import eight_bits
    from sparvar_jax.weights import checkpoint

    table = Table("part", "kind", "parameters", "bytes", "matrices", "from", box=None)
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    for part, module in described.parts.items():
        shapes = checkpoint.abstract_parameters(module)
        count = sum(math.prod(leaf.shape) for leaf in shapes.values())
        source = Text(told(manifest.get(part, {}).get("source", "unknown"), 200))
        size, form = _gib(weights[part]), eight_bits.form_of(module) or "dense"
        table.add_row(part, config[part]["kind"], f"{count:,}", size, form, source)
    return table


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
