"""Files and folders that appear whole or not at all: written under a temporary name, then renamed.

Temporary names are random, of one length, and made exclusively, so that nobody else's file or link
is written to. What was written is on the disk before it gets its name.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

POINTER = b"version https://git-lfs.github.com/spec/"
_PART = ".part"
_PATIENCE = 100
_TEMPORARY = re.compile(r"\.sparvar-[0-9a-f]{16}\.part")
# Earlier versions named the stage after its part.
_STAGES = re.compile(r"\.(stage|transformer|tokenizer|text)-\w+")

# The process has one umask, and it is read by setting it: two threads at once could lose it.
_reading_umask = threading.Lock()


@contextlib.contextmanager
def whole_file(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error.

    The temporary file is made at once, so that a folder that is missing or cannot be written to
    is reported before the work and not after it. Raises ValueError in these cases. private: only
    this user may read it, and losing it with the power does no harm; else it gets what an ordinary
    write would have given.
    """
    path = Path(path)
    temporary = _make_beside(path)
    try:
        yield temporary
        if private:
            temporary.replace(path)
        else:
            publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _make_beside(path: Path) -> Path:
    """A new empty file of a random name in the folder of `path`, for this user alone."""
    temporary = path.with_name(f".sparvar-{secrets.token_hex(8)}{_PART}") if path.name else path
    with writing(path):
        require_name(path)
        flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)
        os.close(os.open(temporary, flags, 0o600))
    return temporary


def require_name(path: Path) -> None:
    """ValueError for a folder, OSError for a name that is too long for the disk."""
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected the name of a file to write")
    with contextlib.suppress(FileNotFoundError):
        path.lstat()


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file its name: on the disk, with what an ordinary write would have given."""
    temporary.chmod(0o666 & ~_umask())
    sync(temporary)
    os.replace(temporary, path)
    sync(path.parent)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """ValueError that `path` cannot be written where the system says so in the block."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"cannot write {path}: folder {path.parent} does not exist") from None
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from None


def _umask() -> int:
    with _reading_umask:
        mask = os.umask(0)
        os.umask(mask)
    return mask


@contextlib.contextmanager
def stage(folder: Path, prefix: str = ".stage-") -> Iterator[Path]:
    """A new folder inside `folder` to build in; it goes away when the block ends."""
    place = Path(tempfile.mkdtemp(prefix=prefix, dir=folder))
    try:
        yield place
    finally:
        try:
            remove_folder(place)
        except BaseException:  # a signal, which must not leave it behind
            remove_folder(place)
            raise


def remove_folder(place: Path) -> None:
    """Remove a folder into which threads of a call that was stopped may still be writing."""
    for _ in range(_PATIENCE):
        shutil.rmtree(place, ignore_errors=True)
        if not place.exists():
            return
        time.sleep(0.02)


def is_stage(name: str) -> bool:
    """Whether a name is one that `stage` gives."""
    return _STAGES.fullmatch(name) is not None


def remove_stages(folder: Path) -> None:
    """Remove the stages that killed processes left in a folder that we hold locked."""
    for entry in list(os.scandir(folder)):
        if is_stage(entry.name) and entry.is_dir(follow_symlinks=False):
            shutil.rmtree(entry.path, ignore_errors=True)


def remove_temporaries(folder: Path) -> None:
    """Remove what killed writers of whole files left in a folder that we hold locked."""
    for entry in list(os.scandir(folder)):
        if _TEMPORARY.fullmatch(entry.name):
            Path(entry.path).unlink(missing_ok=True)


def replace_folder(built: Path, target: Path) -> None:
    """Give a built folder its final name, everything in it on the disk first."""
    for directory, _, names in os.walk(built):
        for name in names:
            sync(Path(directory) / name)
        sync(Path(directory))
    os.replace(built, target)
    sync(target.parent)


def sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk, where its system can say so."""
    with contextlib.suppress(OSError):  # some systems open or sync no folders
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def refuse_pointer(file: Path) -> None:
    """ValueError where a file holds what git-lfs leaves in the place of a file not yet fetched."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        if stream.read(len(POINTER)) == POINTER:
            raise ValueError(
                f"{file} is a git-lfs pointer and not the file itself: run `git lfs pull` in its "
                "folder, or download it again"
            )
