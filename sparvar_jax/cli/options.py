"""Command line options that several commands take."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """Compute dtypes a user can ask for."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Cache(StrEnum):
    """Kinds of key/value cache a user can ask for."""

    lean = "lean"
    int8 = "int8"
    full = "full"


Model = Annotated[
    Path | None, typer.Option("--model", help="Model directory or name; without it the demo model.")
]
Plan = Annotated[
    str | None, typer.Option("--plan", help="Plan, such as dense; `sparvar plans` lists them.")
]
Aspect = Annotated[
    str | None, typer.Option("--aspect", help="Aspect ratio W:H, snapped to the nearest one.")
]
Size = Annotated[
    str | None, typer.Option("--size", help="0.06M, 0.25M, 0.60M or 1M of the largest picture.")
]
Precision = Annotated[
    Dtype | None, typer.Option("--dtype", help="Compute dtype; by default what suits the device.")
]
CacheKind = Annotated[
    Cache,
    typer.Option("--cache", help="Keys and values: lean keeps what is read later, int8 in 8 bits."),
]
Num = Annotated[
    int, typer.Option("--num", min=1, max=4096, help="How many pictures, drawn as one batch.")
]
Guidance = Annotated[
    str | None, typer.Option("--guidance", help="Guidance strength, or off.", metavar="FLOAT|off")
]
Temperature = Annotated[float | None, typer.Option("--temperature", help="Sampling temperature.")]
ClassModel = Annotated[
    Path, typer.Option("--model", help="Class-conditional model: directory or name.")
]


def name_of(dtype: Dtype | None) -> str | None:
    """The dtype as the library names it."""
    return dtype.value if dtype else None


def given(**asked: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in asked.items() if value is not None}


def check_draws(model: Path | None, wanted: str) -> None:
    """ValueError unless a model draws what a command is for: "classes" or "prompts"."""
    from sparvar_jax.pipelines import loading

    folder = loading.model_folder(model)
    family = loading.family_in(folder)
    if family.draws != wanted:
        raise ValueError(f"{folder} draws {family.draws}: give a model that draws {wanted}")


def refuse(model: Path | None, **given: object) -> None:
    """ValueError for options that mean nothing to a class-conditional model."""
    odd = [name for name, value in given.items() if value not in (None, False)]
    if odd:
        raise ValueError(f"{model} draws classes, in one size: leave out {', '.join(odd)}")
