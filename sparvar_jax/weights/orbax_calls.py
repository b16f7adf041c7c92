"""Calls into Orbax that fail with one line: its threads report every failure a second time."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sparvar_jax.weights.told import told

_CODE = re.compile(r"os_error_code='(\d+)'")
_LATE = "Event loop is closed"


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what Orbax's threads print out of stderr; errors of the calls themselves are raised.

    Answers of a failed write arrive after its event loop is gone, some after this block: those are
    kept out for the rest of the process.
    """
    log, thread_hook, hook = logging.getLogger("absl"), threading.excepthook, sys.unraisablehook
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    threading.excepthook = lambda args: None
    sys.unraisablehook = _without_late_answers(hook)
    logging.getLogger("asyncio").addFilter(_of_others)
    try:
        yield
        sys.unraisablehook = hook
        logging.getLogger("asyncio").removeFilter(_of_others)
    finally:
        log.setLevel(level)
        threading.excepthook = thread_hook


def _of_others(record: logging.LogRecord) -> bool:
    """Whether a record is none of a failed task of Orbax, which nobody asked for its result."""
    text = record.getMessage()
    return not ("never retrieved" in text and "orbax" in text)


def _without_late_answers(hook: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The hook for errors nobody can catch, which answers to a closed event loop do not reach."""
    if getattr(hook, "passes_over", None) == _LATE:
        return hook

    def passing_over(unraisable: Any) -> None:
        if not isinstance(unraisable.exc_value, RuntimeError) or str(unraisable.exc_value) != _LATE:
            hook(unraisable)

    passing_over.passes_over = _LATE  # type: ignore[attr-defined]
    return passing_over


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
