"""`sparvar demo`: one picture by the dense plan and by a sparse one, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparvar_jax.cli import console, options


def demo(
    prompt: Annotated[str | None, typer.Argument(help="What to draw.")] = None,
    out: Annotated[Path, typer.Option("--out", help="PNG to write.")] = Path("demo.png"),
    plan: options.Plan = None,
    model: options.Model = None,
    seed: Annotated[int, typer.Option("--seed", help="Both pictures draw from it.")] = 0,
    size: options.Size = None,
    aspect: options.Aspect = None,
    dtype: options.Precision = None,
) -> None:
    """Draw dense and sparse side by side, with difference, seconds and PSNR, into one PNG."""
    from sparvar_jax.pipelines import loading

    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    folder = loading.model_folder(model)
    if loading.family_in(folder).draws == "classes":
        options.refuse(folder, prompt=prompt, size=size, aspect=aspect)
    drawing = options.given(plan=plan, seed=seed, size=size, aspect_ratio=aspect)
    _run(folder, prompt, options.name_of(dtype), drawing, out)


def _run(
    folder: Path, prompt: str | None, dtype: str | None, drawing: dict[str, Any], out: Path
) -> None:
    import jax

    from sparvar_jax.pipelines import metadata
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.study import beside
    from sparvar_jax.study.bench import default_subject
    from sparvar_jax.weights.files import whole_file

    console.use_compilation_cache()
    with whole_file(out) as opened:
        with console.progress() as report:
            pipe = Pipeline.from_checkpoint(folder, dtype=dtype, progress=report)
            subject = default_subject(pipe, 1) if prompt is None else [prompt]
            found = beside.beside_dense(pipe, subject, progress=report, **drawing)
        about = {
            "subject": str(subject[0]),
            "seed": str(drawing["seed"]),
            "model": pipe.model.name,
            "dtype": pipe.model.transformer.config.dtype,
            "device": jax.devices()[0].device_kind,
        }
        below = ", ".join([about["subject"], *(f"{k} {about[k]}" for k in list(about)[1:])])
        picture = beside.lettered(found, below)
        told = {"plan": found.plan, "measured": found.line()}
        metadata.write_png(opened, picture, {**about, **told})
    console.say(f"{out}: {picture.shape[1]}x{picture.shape[0]}; {found.line()}")
