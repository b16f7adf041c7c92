"""One process at a time in a folder: a lock file that ends with its process and leaves nothing."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path

_FLAGS = os.O_CREAT | os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_UNKNOWN = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF)


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = False, strict: bool = False) -> Iterator[None]:
    """Hold the lock named by a file, which is made for it and removed again.

    wait: wait for the process that holds it, with a warning. strict: ValueError, not a warning,
    where the file system knows no locks. Raises ValueError where another
    process holds the lock and `wait` is off, and where the name is taken by something else, such
    as a link; FileNotFoundError where the folder does not exist.
    """
    handle = _acquire(file, wait, strict)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # removed under the lock: others look again
            file.unlink()
        os.close(handle)


def _acquire(file: Path, wait: bool, strict: bool) -> int:
    while True:
        try:
            handle = os.open(file, _FLAGS, 0o666)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise ValueError(
                f"cannot lock {file} ({error.strerror}): remove what has this name, or choose a "
                "folder you may write to"
            ) from error
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise ValueError(f"{file} is no plain file: remove what has this name")
            _lock(handle, file, wait, strict)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), file.lstat()):
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)  # its holder has removed the file meanwhile: ours locks nothing


def _lock(handle: int, file: Path, wait: bool, strict: bool) -> None:
    try:
        import fcntl
    except ImportError:  # no locks of this kind here (Windows)
        if strict:
            raise ValueError("this system knows no locks") from None
        return
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise ValueError(
                    f"another process is working on {file.parent}: let it finish"
                ) from None
            warnings.warn(f"waiting for another process that writes to {file.parent}", stacklevel=4)
            fcntl.flock(handle, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _UNKNOWN:
            raise
        if strict:
            raise ValueError(f"the file system of {file.parent} knows no locks") from None
        warnings.warn(
            f"the file system of {file.parent} knows no locks: run one process at a time there",
            stacklevel=4,
        )
