"""`sparvar warmup`: compile what a call of `sparvar generate` runs, before it is needed."""

from __future__ import annotations

from typing import Annotated

import typer

from sparvar_jax.cli import console, options


def warmup(
    model: options.Model = None,
    plan: options.Plan = None,
    num: options.Num = 1,
    aspect: options.Aspect = None,
    size: options.Size = None,
    guidance: options.Guidance = None,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Prompt whose length counts: 32, 64, 128 or 512 tokens.")
    ] = "a picture",
    negative: Annotated[
        str | None, typer.Option("--negative", help="Also compile for a negative prompt.")
    ] = None,
    dtype: options.Precision = None,
) -> None:
    """Compile all programs of a plan into the compile cache; no weights are loaded."""
    from sparvar_jax.pipelines import loading
    from sparvar_jax.pipelines.class_pipeline import (
        ClassPipeline,
        describe_class_model,
        is_class_model,
    )
    from sparvar_jax.pipelines.pipeline import Pipeline

    cache, watch = console.use_compilation_cache(), console.Stopwatch()
    folder = loading.model_folder(model)
    described = loading.compute_dtype(options.name_of(dtype))
    drawing = {"plan": plan, "guidance": guidance}
    with console.progress() as report:
        if is_class_model(folder):
            options.refuse(folder, negative=negative, aspect=aspect, size=size)
            pipe = ClassPipeline(describe_class_model(folder, described))
            pipe.warm_up([None] * num, progress=report, **drawing)
        else:
            drawing |= {"negative": negative, "aspect_ratio": aspect, "size": size}
            pipe = Pipeline(loading.describe_model(folder, described))
            pipe.warm_up([prompt] * num, progress=report, **drawing)
    watch.lap("compiled")
    watch.tell()
    console.output.print(f"programs of {pipe.model.name} are in {cache}", highlight=False)
