"""`sparvar convert`: PyTorch checkpoints into a model directory, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparvar_jax.cli import console


def convert(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SOURCE...",
            help="Checkpoint file or folder, hf://owner/name, or a model directory.",
        ),
    ],
    into: Annotated[
        Path | None, typer.Option("--into", help="Model directory that gets one more part.")
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Take the averaged weights of a training checkpoint.")
    ] = False,
    kind: Annotated[
        str | None, typer.Option("--kind", help="Refuse any other kind of checkpoint.")
    ] = None,
    export: Annotated[
        Path | None, typer.Option("--export", help="Write SOURCE's part back: .pth, .safetensors.")
    ] = None,
    part: Annotated[
        str, typer.Option("--part", help="Part to export: transformer, tokenizer or text.")
    ] = "transformer",
) -> None:
    """Add released checkpoints to a model directory (--into), or write a part back (--export)."""
    if (into is None) == (export is None):
        raise ValueError("give either --into DIR to convert, or --export FILE to write back")
    if export is not None and len(sources) > 1:
        raise ValueError(f"--export writes a part of one model, got {len(sources)} sources")
    if export is not None:
        _export(sources[0], part, export)
    for source in sources if into is not None else ():
        assert into is not None
        _convert(source, into, ema, kind)


def _convert(source: str, into: Path, ema: bool, kind: str | None) -> None:
    from sparvar_convert.run import convert_source

    with console.progress() as report:

        def moved(path: str, done: int, total: int) -> None:
            del path
            report("convert", done, total)

        done = convert_source(source, into, moved, ema=ema, kind=kind)
    console.say(
        f"{done.title} ({done.kind}) from a {done.container}: {done.tensors} tensors, "
        f"{done.parameters:,} parameters -> {done.folder}"
    )
    for reason, keys in done.ignored.items():
        console.say(f"left behind: {len(keys)} x {reason}")


def _export(source: str, part: str, file: Path) -> None:
    from sparvar_convert.export import save_state_dict
    from sparvar_convert.families import family_of

    from sparvar_jax.weights import checkpoint

    count = save_state_dict(source, part, file)
    console.say(f"{count} tensors -> {file}")
    note = family_of(checkpoint.read_config(source)[part]["kind"]).note
    if note:
        console.say(f"written: {note}")
