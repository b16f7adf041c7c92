"""Files that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

# The process has one umask, and it is read by setting it: two threads at once could lose it.
_reading_umask = threading.Lock()


@contextlib.contextmanager
def whole_file(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary path beside `path` that becomes `path` when the block ends without an error.

    The temporary file is made at once, so that a folder that is missing or cannot be written to
    is reported before the work and not after it. Raises ValueError in these cases. private: only
    this user may read it; else it gets what an ordinary write would have given.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder: expected the name of a file to write")
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    except FileNotFoundError:
        raise ValueError(f"cannot write {path}: folder {path.parent} does not exist") from None
    except OSError as error:
        raise ValueError(
            f"cannot write {path}: {error.strerror or error}; choose a folder you may write to"
        ) from None
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        if not private:  # mkstemp makes private files
            with _reading_umask:
                mask = os.umask(0)
                os.umask(mask)
            temporary.chmod(0o666 & ~mask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
