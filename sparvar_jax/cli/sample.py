"""`sparvar sample`: many pictures of many classes into one npz file for evaluation."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console, options


def sample(
    model: Annotated[Path, typer.Option("--model", help="Class-conditional model directory.")],
    out: Annotated[Path, typer.Option("--out", help="The .npz file to write.")],
    classes: Annotated[
        str, typer.Option("--classes", help="all, or numbers and ranges such as 0-9,207.")
    ] = "all",
    per_class: Annotated[
        int, typer.Option("--per-class", min=1, help="Pictures of every class.")
    ] = 50,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn together.")] = 64,
    seed: Annotated[int, typer.Option("--seed", help="Picture i draws from seed + i.")] = 0,
    plan: options.Plan = None,
    guidance: Annotated[
        float | None, typer.Option("--guidance", help="Strength at the last scale; 0 is off.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", help="Sampling temperature.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="Kept candidates; 0 keeps all.")
    ] = None,
    top_p: Annotated[
        float | None, typer.Option("--top-p", help="Kept probability; 1 keeps all.")
    ] = None,
    dtype: options.Precision = None,
) -> None:
    """Draw pictures of classes for evaluation; run again after a kill, it goes on."""
    from sparvar_jax import sampling_jobs
    from sparvar_jax.class_pipeline import ClassPipeline

    console.use_compilation_cache()
    told = {
        "plan": plan,
        "guidance": guidance,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "dtype": dtype.value if dtype else None,
    }
    with console.progress() as report:
        pipe = ClassPipeline.from_checkpoint(model, dtype=told["dtype"], progress=report)
        settings = {**told, "model": _fingerprint(model)}
        job = sampling_jobs.SampleJob(
            sampling_jobs.parse_classes(classes, pipe.model.transformer.config.classes),
            per_class,
            batch,
            seed,
            tuple((name, str(value)) for name, value in sorted(settings.items())),
        )
        drawing = {name: value for name, value in told.items() if name != "dtype"}
        pipe.request([0], seed=seed + job.total - 1, **drawing)  # complains before the work

        def draw(labels, seeds):
            return pipe(labels, seed=seeds, **drawing)

        drew = sampling_jobs.run_job(job, draw, out, report)
    state = "drawn" if drew else "was complete already"
    console.output.print(f"{out}: {job.total} pictures, {state}", highlight=False)


def _fingerprint(model: Path) -> str:
    """Tells models apart by what their JSON files say: shapes, defaults and sources."""
    from sparvar_jax import checkpoint

    content = b"".join(
        (model / name).read_bytes() for name in (checkpoint.CONFIG, checkpoint.MANIFEST)
    )
    return hashlib.sha256(content).hexdigest()[:16]
