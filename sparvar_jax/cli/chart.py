"""`sparvar chart`: all plans on one model, and which to take."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from sparvar_jax.cli import console, options


def chart(
    subjects: Annotated[
        list[str] | None, typer.Argument(help="Prompts (or classes) to draw; several.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for JSON, table and picture.")] = Path(
        "chart"
    ),
    name: Annotated[str, typer.Option("--name", help="Name of the files.")] = "chart",
    model: options.Model = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="File of one prompt a line.")
    ] = None,
    plan: Annotated[
        list[str] | None, typer.Option("--plan", help="Plan to measure; again for more.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Picture n draws from seed + n.")] = 0,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Pictures drawn together.")] = 1,
    repeats: Annotated[
        int, typer.Option("--repeats", min=0, help="Timed draws after the first; 0 times that.")
    ] = 1,
    budget_seconds: Annotated[
        float, typer.Option("--budget-seconds", help="Begin no plan after so long.")
    ] = math.inf,
    size: options.Size = None,
    aspect: options.Aspect = None,
    dtype: options.Precision = None,
) -> None:
    """Measure quality, time and memory of all plans, and say which to take; again, it goes on."""
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.study import chart as study
    from sparvar_jax.study import chart_files

    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: give a folder to write into")
    wanted = [*(subjects or []), *_lines(prompts)]
    if not wanted:
        raise ValueError("give prompts to draw, or a file of them by --prompts")
    deadline = time.perf_counter() + budget_seconds
    console.use_compilation_cache()
    with console.progress() as report:
        pipe = Pipeline.from_checkpoint(model, dtype=options.name_of(dtype), progress=report)
    asked: dict[str, Any] = {"size": size, "aspect_ratio": aspect}
    if pipe.model.family.draws == "classes":
        options.refuse(model, size=size, aspect=aspect)
        asked, wanted = {}, [int(subject) for subject in wanted]
    drawn = study.Chart(pipe, wanted, seed, batch, repeats, tuple(asked.items()))
    about = study.describe(drawn)
    known = chart_files.read(out, about, name)

    def keep(rows: list[study.Row]) -> None:
        chart_files.write(out, rows, about, name)
        console.errors.print(f"{chart_files.label(rows[-1]['plan'])}: measured", highlight=False)

    rows = study.measure(drawn, plan or study.PLANS, known=known, write=keep, deadline=deadline)
    chart_files.write(out, rows, about, name)
    console.output.print(f"{chart_files.table(rows)}\n{chart_files.sentence(rows)}", markup=False)


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    if not file.is_file():
        raise ValueError(f"{file} is no file: give one prompt a line")
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]
