"""`sparvar compare`: a checkpoint in PyTorch and in JAX, side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from sparvar_jax.cli import console


def compare(
    checkpoint: Annotated[str, typer.Argument(help="Checkpoint file or folder, or hf://...")],
    converted: Annotated[
        Path | None,
        typer.Option("--converted", help="Model directory; without it a temporary one is made."),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="JSON report; the plot lies beside it as .png.")
    ] = Path("compare.json"),
    size: Annotated[str, typer.Option("--size", help="0.06M, 0.25M, 0.60M or 1M.")] = "0.06M",
    aspect: Annotated[str, typer.Option("--aspect", help="Aspect ratio W:H.")] = "1:1",
    guidance: Annotated[float, typer.Option("--guidance", help="1 is off.")] = 3.0,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the made-up inputs.")] = 0,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest relative error that passes.")
    ] = 1e-4,
    every_layer: Annotated[
        bool, typer.Option("--every-layer", help="Print every layer, not the worst of a scale.")
    ] = False,
) -> None:
    """Run a checkpoint's PyTorch twin and its JAX conversion on the same bits.

    Exit code 0 inside the tolerance, 1 outside, 2 on bad input.
    """
    from sparvar_convert.compare import compare_source, write_report
    from sparvar_convert.side_by_side import Options

    from sparvar_jax.pipelines.numbers import parse_ratio

    if out.suffix != ".json":
        raise ValueError(f"--out must name a .json file, got {out}")
    options = Options(size, parse_ratio(aspect), guidance, seed=seed, tolerance=tolerance)
    found = compare_source(checkpoint, converted, options)
    rows = found.rows if every_layer else _worst_layers(found.rows)
    table = Table("scale", "layer", "max abs", "relative", "bits equal", "exempt", box=None)
    for row in rows:
        bits = "" if row.bits is None else f"{100 * row.bits:.3f} %"
        table.add_row(
            "-" if row.scale is None else str(row.scale),
            row.layer,
            f"{row.max_abs:.2e}",
            f"{row.relative:.2e}" + ("" if row.within(tolerance) else " !"),
            bits,
            str(row.exempt) if bits else "",
        )
    files = write_report(found, out)
    console.say(f"{found.title}: {found.source} against {found.converted}")
    console.output.print(table)
    verdict = "inside" if found.passed else "OUTSIDE"
    console.say(f"{verdict} the tolerance {tolerance:g}; wrote {files[0]} and {files[1]}")
    if not found.passed:
        raise typer.Exit(console.FAILED)


def _worst_layers(rows):
    """Rows with the blocks of a scale reduced to the one with the largest relative error."""
    kept, worst = [], {}
    for row in rows:
        if not row.layer.startswith("block "):
            kept.append(row)
        elif row.scale not in worst:
            worst[row.scale] = len(kept)
            kept.append(row)
        elif row.relative > kept[worst[row.scale]].relative:
            kept[worst[row.scale]] = row
    return kept
