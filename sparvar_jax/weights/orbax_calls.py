"""Calls into Orbax that fail with one line: its threads report every failure a second time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from sparvar_jax.weights.told import told

_CODE = re.compile(r"os_error_code='(\d+)'")
_LATE = "Event loop is closed"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Orbax's threads print out of stderr; errors of the calls themselves are raised.

    Answers of a failed write arrive after its event loop is gone, some after this block: those are
    kept out for the rest of the process.
    """
    log, before = logging.getLogger("absl"), threading.excepthook
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    threading.excepthook = lambda args: None
    try:
        yield
    except Exception:
        _drop_late_answers()
        raise
    finally:
        log.setLevel(level)
        threading.excepthook = before


def _drop_late_answers() -> None:
    inner = sys.excepthook
    if getattr(inner, "drops_late_answers", False):
        return

    def hook(kind, error, trace) -> None:
        if not (kind is RuntimeError and str(error) == _LATE):
            inner(kind, error, trace)

    hook.drops_late_answers = True  # type: ignore[attr-defined]
    sys.excepthook = hook


def reason(error: Exception) -> str:
    """What an error of Orbax or TensorStore says, without its paths where the system has a word."""
    found = _CODE.search(str(error))
    return os.strerror(int(found[1])) if found else told(str(error) or type(error).__name__, 160)


@contextlib.contextmanager
def reading(directory: Path) -> Iterator[None]:
    """ValueError that the part in `directory` is damaged where reading it fails.

    Running out of device memory is no damage and keeps its error.
    """
    try:
        with quiet():
            yield
    except Exception as error:  # Orbax and TensorStore share no error class
        if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise ValueError(
            f"{directory} is damaged: convert it again ({directory.name}: {reason(error)})"
        ) from error
