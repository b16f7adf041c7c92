"""`sparvar generate`: a prompt to PNG files that say how they were made."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console, options


def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[
        Path, typer.Option("--out", help="PNG to write; several get their seed appended.")
    ] = Path("sparvar.png"),
    model: options.Model = None,
    plan: options.Plan = None,
    seed: Annotated[int, typer.Option("--seed", help="Picture b draws from seed + b.")] = 0,
    num: options.Num = 1,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Guidance strength; 1 is off.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Sampling temperature.")
    ] = None,
    negative: Annotated[
        str | None, typer.Option("--negative", help="What the picture should not show.")
    ] = None,
    aspect: options.Aspect = None,
    size: options.Size = None,
    dtype: options.Precision = None,
) -> None:
    """Draw a prompt."""
    from sparvar_jax import metadata
    from sparvar_jax.pipeline import Pipeline

    console.use_compilation_cache()
    targets = _targets(out, seed, num)
    with contextlib.ExitStack() as files:
        # Opened before the work: a folder that cannot be written to is found now.
        opened = [files.enter_context(metadata.whole_file(path)) for path in targets]
        with console.progress() as report:
            pipe = Pipeline.from_checkpoint(
                model, dtype=dtype.value if dtype else None, progress=report
            )
            start = time.perf_counter()
            pictures = pipe(
                [prompt] * num,
                plan=plan,
                seed=seed,
                guidance=guidance,
                temperature=temperature,
                negative=negative,
                aspect_ratio=aspect,
                size=size,
                progress=report,
            )
        seconds = time.perf_counter() - start
        defaults = pipe.model.defaults
        told = {
            "prompt": prompt,
            "negative": negative or "",
            "plan": plan or defaults.plan,
            "guidance": str(defaults.guidance if guidance is None else guidance),
            "temperature": str(defaults.temperature if temperature is None else temperature),
            "model": pipe.model.name,
            "size": size or defaults.size,
            "aspect": aspect or str(defaults.aspect_ratio),
            "dtype": pipe.model.transformer.config.dtype,
            "versions": ", ".join(f"{k} {v}" for k, v in metadata.versions().items()),
        }
        for index, (path, picture) in enumerate(zip(opened, pictures, strict=True)):
            metadata.write_png(path, picture, {**told, "seed": str(seed + index)})
    height, width = pictures.shape[1:3]
    for path in targets:
        console.output.print(f"{path}: {width}x{height}, {seconds:.1f} s", highlight=False)


def _targets(out: Path, seed: int, num: int) -> list[Path]:
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out must name a .png file, got {out}")
    if num == 1:
        return [out]
    return [out.with_stem(f"{out.stem}-{seed + index}") for index in range(num)]
