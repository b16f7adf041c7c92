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
    cache: options.CacheKind = options.Cache.full,
) -> None:
    """Show a model's parts, its plan scale by scale, and an estimate of device memory."""
    from sparvar_jax.pipelines import loading
    from sparvar_jax.pipelines.memory import estimate
    from sparvar_jax.plans.caches import with_cache

    folder = loading.model_folder(model)
    precision = loading.compute_dtype(options.name_of(dtype))
    described = loading.describe_model(folder, precision)
    if described.family.draws == "classes":
        options.refuse(folder, aspect=aspect, size=size)
    asked = options.given(plan=plan, aspect_ratio=aspect, size=size)
    chosen, _ = described.family.asked(described.name, asked).resolve(described)
    chosen = with_cache(chosen, cache.value)
    needed = estimate(described, chosen, num)

    height, width = (side * described.stride for side in chosen.schedule.final)
    console.say(f"model {folder}: pictures of {width}x{height}")
    console.output.print(_parts(folder, described, needed.weights))
    console.say(f"\ndefaults {described.defaults}")
    console.say(f"\nplan {chosen.name}")
    console.say(chosen.describe())
    console.say(
        f"\nmemory of a batch of {num}, estimated: weights {_gib(sum(needed.weights.values()))}, "
        f"{cache.value} cache {_gib(needed.cache)}, {described.family.draws} "
        f"{_gib(needed.condition)}, largest step {_gib(needed.step)}, "
        f"decoding {_gib(needed.decode)}; peak about {_gib(needed.peak)}"
    )
    if "text" in needed.weights:
        freed = _gib(needed.peak_text_freed)
        console.say(f"with --free-text-encoder: peak about {freed}")


def _parts(folder: Path, described: Any, weights: dict[str, int]) -> Table:
    """One line a part: kind, size and where it came from."""
    from sparvar_jax.weights import checkpoint

    table = Table("part", "kind", "parameters", "bytes", "from", box=None)
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    for part, module in described.parts.items():
        shapes = checkpoint.abstract_parameters(module)
        count = sum(math.prod(leaf.shape) for leaf in shapes.values())
        source = Text(told(manifest.get(part, {}).get("source", "unknown"), 200))
        table.add_row(part, config[part]["kind"], f"{count:,}", _gib(weights[part]), source)
    return table


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
