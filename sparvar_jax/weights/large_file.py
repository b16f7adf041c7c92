"""Large files that appear whole or not at all; what a killed process left goes with the next."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from sparvar_jax.weights import files
from sparvar_jax.weights.locks import locked

_PREFIX, _LOCK, _TRIES = ".export-", ".lock", 20


@contextlib.contextmanager
def large_file(path: str | Path) -> Iterator[Path]:
    """Like `whole_file`, in a folder of its own, which the next call removes if this one is killed.

    Libraries that make temporary files of their own beside the one they write make them there.
    """
    with whole_files([Path(path)]) as (temporary,):
        yield temporary


@contextlib.contextmanager
def whole_files(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """Temporary paths that become `paths`, files of one folder, when the block ends.

    They are made at once, so that what cannot be written is found before the work: ValueError.
    """
    folder = paths[0].parent
    with contextlib.ExitStack() as exits:
        for path in paths:
            with files.writing(path):
                files.require_name(path)
        with files.writing(paths[0]):
            _remove_dead(folder)
            place = exits.enter_context(_locked_stage(folder))
            temporaries = [place / f"file{index}" for index in range(len(paths))]
            for temporary in temporaries:
                temporary.touch(0o600)
        yield temporaries
        for temporary, path in zip(temporaries, paths, strict=True):
            files.publish(temporary, path)


@contextlib.contextmanager
def _locked_stage(folder: Path) -> Iterator[Path]:
    """A folder whose lock says that its process lives.

    Between making and locking it, another process may take it for a dead one's: then make another.
    """
    with contextlib.ExitStack() as exits:
        for _ in range(_TRIES):
            place = exits.enter_context(files.stage(folder, _PREFIX))
            with contextlib.suppress(FileNotFoundError, ValueError):
                exits.enter_context(locked(place / _LOCK))
                break
        else:
            raise ValueError(f"cannot lock {folder}: another process keeps removing what is made")
        yield place


def _remove_dead(folder: Path) -> None:
    """Remove the folders of processes that are gone: nobody holds their locks."""
    for entry in list(os.scandir(folder)):
        if entry.name.startswith(_PREFIX) and entry.is_dir(follow_symlinks=False):
            lock = locked(Path(entry.path) / _LOCK, strict=True)
            with contextlib.suppress(ValueError, OSError), lock:
                files.remove_folder(Path(entry.path))
