"""Proof that nothing in a file was run: a bird that would sing, and Python's own audit."""

from __future__ import annotations

import sys

_FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "pty.spawn",
              "socket.connect")  # fmt: skip
_heard: list[str] = []
_watching: list[bool] = []


def sing(*args: object) -> None:
    """What mutated pickles ask for by name; whoever calls it has run what a file said."""
    del args
    _heard.append("canary")


class Ran(Exception):
    """Code from a file was run."""


def watch() -> None:
    """Listen from now on to whatever starts processes or calls others; once a process."""
    if not _watching:
        _watching.append(False)
        sys.addaudithook(_hear)


class listening:
    """A block in which nothing may be heard; `Ran` at its end."""

    def __init__(self, allowed: tuple[str, ...] = ()):
        self._allowed = allowed

    def __enter__(self) -> None:
        _heard.clear()
        _watching[:] = [True]

    def __exit__(self, *_: object) -> None:
        _watching[:] = [False]
        heard = [event for event in _heard if event not in self._allowed]
        if heard:
            raise Ran(f"a file had this run: {', '.join(sorted(set(heard)))}")


def _hear(event: str, args: tuple) -> None:
    del args
    if _watching[0] and event.startswith(_FORBIDDEN):
        _heard.append(event)
