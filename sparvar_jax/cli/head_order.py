"""`sparvar head-order`: which heads of a model may stop seeing earlier scales, for `per_head`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console, options


def head_order(
    subjects: Annotated[list[str], typer.Argument(help="Prompts (or classes) to draw; ten do.")],
    out: Annotated[Path, typer.Option("--out", help="The .json file to write.")],
    model: options.Model = None,
    seed: Annotated[int, typer.Option("--seed", help="Picture n draws from seed + n.")] = 0,
    size: options.Size = None,
    aspect: options.Aspect = None,
    dtype: options.Precision = None,
) -> None:
    """Measure which heads may stop seeing earlier scales; `per_head(FILE, 0.1)` is a plan of it."""
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.policies.head_orders import write_orders
    from sparvar_jax.study.head_order import measure

    if out.suffix != ".json" or out.is_dir():
        raise ValueError(f"{out} must be a file that ends in .json")
    console.use_compilation_cache()
    with console.progress() as report:
        pipe = Pipeline.from_checkpoint(model, dtype=options.name_of(dtype), progress=report)
    if pipe.model.family.draws == "classes":
        options.refuse(model, size=size, aspect=aspect)
        found = measure(pipe, [int(subject) for subject in subjects], seed=seed)
    else:
        shape = {"size": size, "aspect_ratio": aspect}
        found = measure(pipe, subjects, seed=seed, **shape)
    write_orders(out, found, f"{pipe.model.name}, {len(subjects)} generations from seed {seed}")
    console.output.print(
        f"{out}: {len(found.orders)} orders of {found.layers} x {found.heads} heads",
        highlight=False,
    )
