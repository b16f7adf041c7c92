"""Command line options that several commands take."""

from __future__ import annotations

import hashlib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer


class Dtype(StrEnum):
    """Compute dtypes a user can ask for."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class Matrices(StrEnum):
    """Forms of large matrices in memory that a user can ask for."""

    dense = "dense"
    stored = "stored"
    int8 = "int8"
    fp8 = "fp8"


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
Weights = Annotated[
    Matrices | None,
    typer.Option("--weights", help="int8, fp8: products in 8 bits; stored: 8 bits on disk stay."),
]
Stream = Annotated[
    Dtype | None,
    typer.Option("--stream", help="Residual stream; bfloat16 moves half the bytes, see docs."),
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
Devices = Annotated[
    str | None,
    typer.Option("--devices", help="Devices to divide the work over: a number, or auto."),
]
Coordinator = Annotated[
    str | None,
    typer.Option("--coordinator", help="HOST:PORT of the first of several processes, or auto."),
]
Processes = Annotated[int | None, typer.Option("--processes", min=1, help="How many there are.")]
Process = Annotated[int | None, typer.Option("--process", min=0, help="Which one this is.")]
ClassModel = Annotated[
    Path, typer.Option("--model", help="Class-conditional model: directory or name.")
]


def name_of(dtype: Dtype | None) -> str | None:
    """The dtype as the library names it."""
    return dtype.value if dtype else None


def form_of(weights: Matrices | None) -> Any:
    """The form of matrices as the library names it."""
    return weights.value if weights else "dense"


def loading(dtype: Dtype | None, weights: Matrices | None, stream: Dtype | None) -> dict[str, Any]:
    """How a model is loaded, as arguments of the library."""
    how = {"dtype": name_of(dtype), "weights": form_of(weights)}
    return how | given(stream=name_of(stream))


def given(**asked: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in asked.items() if value is not None}


def fingerprint(model: Path) -> str:
    """Tells models apart by what their JSON files say: shapes, defaults and sources."""
    from sparvar_jax.weights import checkpoint

    content = b"".join(
        (model / name).read_bytes() for name in (checkpoint.CONFIG, checkpoint.MANIFEST)
    )
    return hashlib.sha256(content).hexdigest()[:16]


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
