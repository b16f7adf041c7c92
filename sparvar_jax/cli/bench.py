"""`sparvar bench`: dense against any plans on this device with this model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from sparvar_jax.cli import console, options

_PLANS = ("sparvar-paper", "sparvar-fast")
_QUICK = ("sparvar-fast",)
_WIDTH = 160


def bench(
    plan: Annotated[
        list[str] | None,
        typer.Option("--plan", help="Plan to hold against dense; give it several times."),
    ] = None,
    model: options.Model = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="What to draw; give it several times.")
    ] = None,
    num: options.Num = 1,
    seed: Annotated[int, typer.Option("--seed", help="Picture b draws from seed + b.")] = 0,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls of a plan.")] = 5,
    size: options.Size = None,
    aspect: options.Aspect = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="One plan, small pictures, one timed call.")
    ] = False,
    out: Annotated[Path, typer.Option("--out", help="HTML page to write.")] = Path("bench.html"),
    dtype: options.Precision = None,
    weights: options.Weights = None,
    stream: options.Stream = None,
) -> None:
    """Measure dense and sparse plans: seconds by part, memory, and likeness of the pictures."""
    from sparvar_jax.pipelines import loading

    folder = loading.model_folder(model)
    drawing: dict[str, Any] = {"size": size, "aspect_ratio": aspect}
    if loading.family_in(folder).draws == "classes":
        options.refuse(folder, prompt=prompt, size=size, aspect=aspect)
        drawing = {}
    elif quick and size is None:
        drawing["size"] = "0.06M"
    asked = {
        "plans": plan or (_QUICK if quick else _PLANS),
        "subject": prompt,
        "num": num,
        "seed": seed,
        "repeats": 1 if quick else repeats,
    }
    _run(folder, options.loading(dtype, weights, stream), out, asked | drawing)


def _run(folder: Path, how: dict[str, Any], out: Path, asked: dict[str, Any]) -> None:
    from sparvar_jax.pipelines.pipeline import Pipeline
    from sparvar_jax.study import bench_page
    from sparvar_jax.study.bench import measure
    from sparvar_jax.weights.files import whole_file

    if out.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--out must name an .html file, got {out}")
    console.use_compilation_cache()
    with whole_file(out) as opened:
        with console.progress() as report:
            pipe = Pipeline.from_checkpoint(folder, **how, progress=report)
            found = measure(pipe, progress=report, **asked)
        opened.write_text(bench_page.page(found), encoding="utf-8")
    table = Table(*bench_page.COLUMNS, box=None)
    for row in found.rows:
        table.add_row(*bench_page.cells(row))
    # Whole lines, also where the terminal is narrow or a pipe.
    Console(width=max(console.output.width, _WIDTH)).print(table)
    for name, value in found.about.items():
        console.output.print(f"{name}: {value}", highlight=False, markup=False)
    console.output.print(f"{out}: table and pictures", highlight=False)
