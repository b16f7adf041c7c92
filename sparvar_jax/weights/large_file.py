"""Large files that appear whole or not at all; what a killed process left goes with the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from sparvar_jax.weights import files
from sparvar_jax.weights.locks import locked

_PREFIX, _LOCK = ".export-", ".lock"


@contextlib.contextmanager
def large_file(path: str | Path) -> Iterator[Path]:
    """Like `whole_file`, in a folder of its own, which the next call removes if this one is killed.

    Libraries that make temporary files of their own beside the one they write make them there.
    """
    path = Path(path)
    with files.whole_file(path) as probe:  # complains where nothing can be written
        probe.unlink()
        with contextlib.ExitStack() as exits:
            with files.writing(path):
                _remove_dead(path.parent)
                place = exits.enter_context(files.stage(path.parent, _PREFIX))
                exits.enter_context(locked(place / _LOCK))
            with files.whole_file(place / "file") as temporary:
                yield temporary
            os.replace(place / "file", probe)


def _remove_dead(folder: Path) -> None:
    """Remove the folders of processes that are gone: nobody holds their locks."""
    for entry in list(os.scandir(folder)):
        if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(ValueError, OSError), locked(Path(entry.path) / _LOCK):
                files.remove_folder(Path(entry.path))
