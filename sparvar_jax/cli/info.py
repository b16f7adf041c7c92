"""`sparvar info`: what a model directory holds and what drawing with it takes."""

from __future__ import annotations

import math

from rich.table import Table

from sparvar_jax.cli import console, options

_GIB = 1 << 30


def info(
    model: options.Model = None,
    plan: options.Plan = None,
    num: options.Num = 1,
    aspect: options.Aspect = None,
    size: options.Size = None,
    dtype: options.Precision = None,
) -> None:
    """Show a model's parts, its plan scale by scale, and an estimate of device memory."""
    from sparvar_jax import checkpoint, loading
    from sparvar_jax.memory import estimate
    from sparvar_jax.pipeline import picture_size, resolve_plan, resolve_schedule

    folder = loading.model_folder(model)
    described = loading.describe_model(
        folder, loading.compute_dtype(dtype.value if dtype else None)
    )
    schedule = resolve_schedule(described, aspect, size)
    chosen = resolve_plan(described, plan, schedule)
    needed = estimate(described, chosen, num)

    table = Table("part", "kind", "parameters", "bytes", "from", box=None)
    config, manifest = checkpoint.read_config(folder), checkpoint.read_manifest(folder)
    modules = (described.transformer, described.tokenizer, described.text_encoder)
    for part, module in zip(checkpoint.PARTS, modules, strict=True):
        shapes = checkpoint.abstract_parameters(module)
        count = sum(math.prod(leaf.shape) for leaf in shapes.values())
        source = str(manifest.get(part, {}).get("source", "unknown"))
        row = (part, config[part]["kind"], f"{count:,}", _gib(needed.weights[part]), source)
        table.add_row(*row)
    height, width = picture_size(described, schedule)
    show = console.output.print
    show(f"model {folder}: pictures of {width}x{height}", highlight=False)
    show(table)
    show(f"\ndefaults {described.defaults}", highlight=False)
    show(f"\nplan {chosen.name}", highlight=False)
    show(chosen.describe(), markup=False, highlight=False)
    show(
        f"\nmemory of a batch of {num}, estimated: weights {_gib(sum(needed.weights.values()))}, "
        f"cache {_gib(needed.cache)}, largest step {_gib(needed.step)}, "
        f"decoding {_gib(needed.decode)}; peak about {_gib(needed.peak)}",
        highlight=False,
    )


def _gib(count: int) -> str:
    return f"{count / _GIB:.2f} GiB"
