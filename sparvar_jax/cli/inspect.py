"""`sparvar inspect`: what sparse attention rests on, measured in a real generation."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console, options


def inspect(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON and PNG files.")] = Path(
        "inspect"
    ),
    model: options.Model = None,
    plan: options.Plan = "sparvar-paper",
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    aspect: options.Aspect = None,
    size: options.Size = None,
    dtype: options.Precision = None,
) -> None:
    """Measure sinks, locality, likeness of scales and what a plan reads, layer by layer."""
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.study.report import inspect_prompt

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder to write into")
    console.use_compilation_cache()
    with console.progress() as report:
        pipe = Pipeline.from_checkpoint(model, dtype=options.name_of(dtype), progress=report)
    shape = options.given(aspect_ratio=aspect, size=size)
    rows = inspect_prompt(pipe, prompt, out, plan=plan or "dense", seed=seed, **shape)
    console.say(f"{len(rows)} rows (scale, layer) in {out}/inspect.json")
