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
    weights: options.Weights = None,
    stream: options.Stream = None,
    cache: options.CacheKind = options.Cache.full,
    devices: options.Devices = None,
) -> None:
    """Compile all programs of a plan into the compile cache; no weights are loaded."""
    from sparvar_jax.pipelines import loading
    from sparvar_jax.pipelines.pipeline import Pipeline

    programs, watch = console.use_compilation_cache(), console.Stopwatch()
    folder = loading.model_folder(model)
    precision = loading.compute_dtype(options.name_of(dtype))
    described = loading.describe_model(
        folder, precision, options.form_of(weights), options.name_of(stream)
    )
    pipe = Pipeline(described, cache=cache.value, devices=devices)
    shown = {"negative": negative, "aspect_ratio": aspect, "size": size}
    drawing, subject = options.given(plan=plan, guidance=guidance, **shown), [prompt] * num
    if pipe.model.family.draws == "classes":
        options.refuse(folder, negative=negative, aspect=aspect, size=size)
        subject = [None] * num
    with console.progress() as report:
        pipe.warm_up(subject, progress=report, **drawing)
    watch.lap("compiled")
    watch.tell()
    console.say(f"programs of {pipe.model.name} are in {programs or 'memory alone'}")
