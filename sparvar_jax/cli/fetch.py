"""`sparvar fetch`: a released model by name, from the hub to a model directory."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.table import Table

from sparvar_jax.cli import console, stopping


def fetch(
    name: Annotated[
        str | None,
        typer.Argument(help="Such as infinity-2b, or owner/name; without it the table of names."),
    ] = None,
) -> None:
    """Download and convert a released model; afterwards `--model NAME` draws with it."""
    from sparvar_jax.pipelines import released, sharing

    if name is None:
        _table()
        return
    if name not in released.RELEASES and released.is_repository(name):
        folder = sharing.snapshot(name)
    else:
        folder = _fetch(name)
    _show(f"{name} is in {folder}: draw with --model {name}")


def _fetch(name: str):
    from sparvar_jax.pipelines import released

    if name not in released.RELEASES:
        released.find(name)  # names the nearest one
    from sparvar_convert.fetch import fetch as get

    release = released.RELEASES[name]
    _show(f"{release.title}; weights under {_licences(release)}: you accept them by using it")
    with stopping.cleanly(), console.progress() as report:
        parts: list[str] = []

        def tell(line: str) -> None:
            parts.append(line)
            _show(line)

        def moved(path: str, done: int, total: int) -> None:
            del path
            report(f"convert {len(parts)}", done, total)

        return get(name, progress=moved, tell=tell)


def _licences(release) -> str:
    found = {f"{source.licence} ({source.repository})": None for source in release.sources}
    return ", ".join(found)


def _table() -> None:
    from sparvar_jax.pipelines import released

    table = Table("name", "what it draws", "here", "from", "licences", box=None)
    for release in released.RELEASES.values():
        sources = ", ".join(dict.fromkeys(f"{source.repository}" for source in release.sources))
        here = "no" if released.missing_parts(release) else "yes"
        licences = ", ".join(dict.fromkeys(source.licence for source in release.sources))
        table.add_row(release.name, release.title, here, sources, licences)
    console.output.print(table)


def _show(text: str) -> None:
    console.output.print(text, highlight=False, markup=False)
