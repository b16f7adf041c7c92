"""Signals that end a command cleanly: what Ctrl-C does, SIGTERM and SIGHUP do too."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator

_NAMES = ("SIGTERM", "SIGHUP")  # the second is not everywhere


@contextlib.contextmanager
def cleanly() -> Iterator[None]:
    """Leave the block by SystemExit with 128 + the signal's number, so that it cleans up.

    More signals of these kinds are ignored meanwhile. Threads other than the main one cannot
    handle signals: there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in numbers}

    def stop(number: int, frame: object) -> None:
        del frame
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        print(f"error: stopped by {signal.Signals(number).name}", file=sys.stderr)
        raise SystemExit(128 + number)

    for number in numbers:
        if before[number] is not signal.SIG_IGN:  # nohup stays in force
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
