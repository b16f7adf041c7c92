"""A released model by name: downloaded from the Hub, checked, converted into a model directory.

Each part is fetched and joined to the directory by itself, so that a run that was stopped, or that
had no network for a part, goes on where it was. What is in the Hub's cache is not fetched again.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from sparvar_convert import hub
from sparvar_convert.rules import ConversionError
from sparvar_convert.run import convert_source
from sparvar_convert.stream import Progress
from sparvar_jax.pipelines import released
from sparvar_jax.pipelines.released import Release, Source

Tell = Callable[[str], None]
_GIB = 1 << 30
_CHUNK = 16 << 20


def fetch(name: str, *, progress: Progress | None = None, tell: Tell | None = None) -> Path:
    """Get a released model into the user's data folder; its model directory.

    Args:
        name: a name of `released.RELEASES`.
        progress: of converting, called as (parameter path, done, total).
        tell: called with one line on each part.

    Raises:
        ValueError: one line; parts that were complete stay.
    """
    if name not in released.RELEASES:
        known = ", ".join(released.RELEASES)
        raise ValueError(f"no released model is named {name!r}: choose one of {known}")
    release, say = released.RELEASES[name], tell or (lambda line: None)
    folder = released.models_folder() / name
    wanted = [
        source for source in release.sources if source.part in released.missing_parts(release)
    ]
    listings = {source: _list(release, source) for source in wanted}
    _require_space(folder, listings)
    for source in wanted:
        say(f"{source.part}: {source.repository} {source.path} ({source.licence})")
        _download(source, listings[source])
        convert_source(source.address, folder, progress, kind=source.kind)
    return folder


def _list(release: Release, source: Source) -> list[hub.Listed]:
    """What is to be fetched; nothing where the cache has it."""
    if hub.is_cached(source.address):
        return []
    try:
        return hub.look_up(source.address)
    except ConversionError as error:
        raise ConversionError(f"{release.name} lacks its {source.part}: {error}") from error


def _require_space(folder: Path, listings: dict[Source, list[hub.Listed]]) -> None:
    """ValueError unless the downloads fit into the cache, and what is made of them beside it."""
    from huggingface_hub import constants

    needed = sum(file.size for files in listings.values() for file in files)
    for place in (folder, Path(constants.HF_HUB_CACHE)):
        there = next(parent for parent in (place, *place.parents) if parent.exists())
        free = shutil.disk_usage(there).free
        if free < needed:
            raise ConversionError(
                f"{folder.name} needs {needed / _GIB:.1f} GiB for its files and as much for the "
                f"model made of them; {there} has {free / _GIB:.1f} GiB free: make room, or set "
                "HF_HOME and XDG_DATA_HOME to other disks"
            )


def _download(source: Source, listed: Sequence[hub.Listed]) -> None:
    """Bring one part into the cache and hold its files to their sha256, where one is known."""
    place = hub.download(source.address).path
    known = {file.path: file.sha256 for file in listed if file.sha256}
    root = Path(str(place).removesuffix(source.path)) if source.path else place
    if source.sha256:
        _check(place, source.sha256, "the released model's", f"{source.repository} was changed")
    for path, digest in known.items():
        _check(root / path, digest, "its repository's", "it is fetched anew by the next run")


def _check(file: Path, expected: str, whose: str, what: str) -> None:
    with file.open("rb") as stream:
        found = hashlib.sha256()
        while chunk := stream.read(_CHUNK):
            found.update(chunk)
    if found.hexdigest() != expected:
        blob = file.resolve()
        file.unlink()
        blob.unlink(missing_ok=True)
        raise ConversionError(
            f"{file.name} has sha256 {found.hexdigest()[:16]}..., expected {whose} "
            f"{expected[:16]}...: the file is removed; {what}"
        )
