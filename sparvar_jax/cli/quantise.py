"""`sparvar quantise`: a model directory with matrices in 8 bits, from a dense one."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console


class Format(StrEnum):
    """Forms of 8-bit matrices."""

    int8 = "int8"
    fp8 = "fp8"


def quantise(
    model: Annotated[Path, typer.Argument(help="Model directory or name.")],
    into: Annotated[Path, typer.Option("--into", help="Model directory to write.")],
    form: Annotated[
        Format, typer.Option("--format", help="int8 keeps e4m3 behind the GELU; fp8 is all e4m3.")
    ] = Format.int8,
) -> None:
    """Write a model with large matrices in 8 bits; run again after a kill, it goes on."""
    from sparvar_jax.pipelines.quantising import quantise_model

    with console.progress() as report:
        written = quantise_model(model, into, form.value, report)
    console.say(f"{into}: {', '.join(written) or 'was complete already'}")
