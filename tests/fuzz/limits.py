"""Limits of one case: memory beyond what the process has, seconds of processor time, quietness."""

from __future__ import annotations

import os
import resource
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

MEMORY = 1 << 30
SECONDS = 20.0


class TooLong(Exception):
    """A case took more processor time than any may."""


class TooMuch(Exception):
    """A case asked for more memory than any may."""


class Noise(Exception):
    """A library wrote to the standard streams."""


def limited(run: Callable[[], Any], memory: int = MEMORY, seconds: float = SECONDS) -> Any:
    """Run a case: at most `memory` bytes more than there are now, and `seconds` of processors.

    Code that does not come back to Python is ended by the process that watches this one.
    """
    before = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + memory, before[1]))
    old = signal.signal(signal.SIGPROF, _late)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        return run()
    except MemoryError as error:
        raise TooMuch(str(error)) from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, old)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _late(number: int, frame: object) -> None:
    del number, frame
    raise TooLong(f"more than {SECONDS:g} s of processor time")


@contextmanager
def quiet() -> Iterator[None]:
    """`Noise` where something in the block wrote past Python, to the process's own stderr."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        heard.seek(0)
        text = heard.read(300)
    if text:
        raise Noise(text.decode(errors="replace"))


def largest_resident() -> int:
    """Bytes of the largest resident set since `forget_largest`, where Linux keeps it."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    return 0


def forget_largest() -> None:
    """Begin to count anew."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return
