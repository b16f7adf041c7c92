"""`sparvar sample`: many pictures of many classes into one npz file for evaluation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from sparvar_jax.cli import console, options


def sample(
    model: options.ClassModel,
    out: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    classes: Annotated[
        str, typer.Option("--classes", help="all, or numbers and ranges such as 0-9,207.")
    ] = "all",
    per_class: Annotated[
        int, typer.Option("--per-class", min=1, max=10_000_000, help="Pictures of every class.")
    ] = 50,
    batch: Annotated[
        int, typer.Option("--batch", min=1, max=65_536, help="Pictures drawn together.")
    ] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Picture i draws from seed + i.")] = 0,
    plan: options.Plan = None,
    guidance: options.Guidance = None,
    temperature: options.Temperature = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="Kept candidates; 0 keeps all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Kept probability; 1 keeps all.")
    ] = None,
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
    devices: options.Devices = None,
    coordinator: options.Coordinator = None,
    processes: options.Processes = None,
    process: options.Process = None,
) -> None:
    """Draw pictures of classes for evaluation; run again after a kill, it goes on."""
    drawing = {
        "plan": plan,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
    }
    how, hosts = options.loading(dtype, weights, stream), (coordinator, processes, process)
    asked = Asked(classes, per_class, batch, seed, how, devices, hosts)
    total, drew = _run(model, out, asked, drawing)
    state = "drawn" if drew else "was complete already"
    console.say(f"{out}: {total} pictures, {state}")


@dataclasses.dataclass(frozen=True)
class Asked:
    """Which pictures, in which batches; see the options of `sample`."""

    classes: str
    per_class: int
    batch: int
    seed: int
    how: dict[str, Any]
    """How the model is loaded: dtype, weights, stream."""
    devices: str | None
    hosts: tuple[str | None, int | None, int | None]


def _run(model: Path, out: Path, asked: Asked, drawing: dict[str, Any]) -> tuple[int, bool]:
    """How many pictures the file holds, and whether any was drawn."""
    from sparvar_jax.pipelines import loading, sampling_jobs
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.runtime import hosts

    host = hosts.join(*asked.hosts)
    console.use_compilation_cache()
    with console.progress() as report:
        options.check_draws(model, "classes")
        model = loading.model_folder(model)
        job = _job(model, asked, drawing)  # complains before the work
        pipe = Pipeline.from_checkpoint(model, **asked.how, devices=asked.devices, progress=report)

        def draw(labels, seeds):
            return pipe(labels, seed=seeds, **drawing)

        return job.total, sampling_jobs.run_job(job, draw, out, report, host)


def _job(model: Path, asked: Asked, drawing: dict[str, Any]) -> Any:
    """What is to be drawn; ValueError for what cannot be, before any weights are read."""
    from sparvar_jax.pipelines import loading, sampling_jobs
    from sparvar_jax.pipelines.numbers import first_seed

    described = loading.describe_model(model)
    settings = {**drawing, **asked.how, "model": options.fingerprint(model)}
    if settings["weights"] == "dense":
        del settings["weights"]
    job = sampling_jobs.SampleJob(
        sampling_jobs.parse_classes(asked.classes, described.transformer.config.classes),
        asked.per_class,
        asked.batch,
        asked.seed,
        tuple((name, str(value)) for name, value in sorted(settings.items())),
    )
    first_seed(asked.seed, job.total)
    described.family.options(**drawing).resolve(described)
    return job
