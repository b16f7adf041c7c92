"""Signals that end a command cleanly: what Ctrl-C does, SIGTERM and SIGHUP do too."""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

TERMINATED = 128 + 15  # shells' code for SIGTERM; a closed terminal counts as one
_NAMES = ("SIGTERM", "SIGHUP")  # the second is not everywhere


class Stopped(SystemExit):
    """SIGTERM or SIGHUP came."""


@contextlib.contextmanager
def cleanly() -> Iterator[None]:
    """Leave the block by `Stopped` with code 143, or by KeyboardInterrupt, so that it cleans up.

    A signal that something in the block swallowed (an event loop that had finished, a finaliser)
    ends it all the same, at its end. More of SIGTERM and SIGHUP are ignored meanwhile. Threads
    other than the main one cannot handle signals: there this does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[BaseException] = []
    before, tell = _handle(came), sys.unraisablehook
    sys.unraisablehook = lambda lost: None if lost.exc_value in came else tell(lost)
    try:
        try:
            yield
        except Exception as error:
            if came:  # what the signal broke on its way is not what happened
                raise came[0] from error
            raise
        if came:
            raise came[0]
    finally:
        sys.unraisablehook = tell
        for number, handler in before.items():
            signal.signal(number, handler)


def _handle(came: list[BaseException]) -> dict[Any, Any]:
    """Let signals raise, and note them in `came`; the handlers there were.

    SIGINT gets a handler of its own, too: event loops replace Python's, and lose an interrupt that
    comes while they end.
    """
    ends = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
    before = {number: signal.getsignal(number) for number in (*ends, signal.SIGINT)}

    def interrupt(number: int, frame: object) -> None:
        del number, frame
        came.append(KeyboardInterrupt())
        raise came[0]

    def stop(number: int, frame: object) -> None:
        del frame
        for each in ends:
            signal.signal(each, signal.SIG_IGN)
        print(f"error: stopped by {signal.Signals(number).name}", file=sys.stderr)
        came.append(Stopped(TERMINATED))
        raise came[-1]

    for number in ends:
        if before[number] is not signal.SIG_IGN:  # nohup stays in force
            signal.signal(number, stop)
    if before[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    return before
