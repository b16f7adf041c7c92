"""What the commands share: one-line errors with exit codes, warnings, progress, compile cache."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from sparvar_jax.cli import stopping
from sparvar_jax.weights.told import LONGEST, escaped, told

if TYPE_CHECKING:
    from sparvar_jax.runtime.progress import Progress as Report

FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130
OUT_OF_MEMORY = (
    "out of device memory; what helps: --cache int8, a smaller --size or --num, --dtype bfloat16, "
    "--free-text-encoder, --guidance 1, or a plan with fewer rows or scales (see `sparvar plans`); "
    "`sparvar info` with the same options tells what a call takes"
)
STAGES = {
    "load": "loading",
    "convert": "converting",
    "measure": "measuring",
    "compile": "compiling",
    "draw": "drawing",
}
# A usage error of the command line library; its module has moved from version to version.
_USAGE_ERROR = typer.BadParameter.__mro__[1]

output = Console(soft_wrap=True)
errors = Console(stderr=True)
_settings = {"traceback": False, "counting": False}


def show_tracebacks(show: bool) -> None:
    """Whether `run` lets foreseen errors through with their traceback."""
    _settings["traceback"] = show


def run(app: typer.Typer, arguments: list[str] | None = None) -> int:
    """Run the command line; every foreseen failure ends in one line on stderr and an exit code.

    2 for bad input, 1 for what failed on the way (device memory, a missing optional package, a
    comparison outside tolerance), 130 for an interrupt, 143 for SIGTERM or a closed terminal. Other
    errors keep their traceback.
    """
    # The compiler logs slow compilations and missing devices as errors; jax raises real ones.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with warnings.catch_warnings():
        warnings.showwarning = functools.partial(_show_warning, set())
        return _run(app, arguments)


def _run(app: typer.Typer, arguments: list[str] | None) -> int:
    try:
        with stopping.cleanly():
            code = int(app(args=arguments, standalone_mode=False) or 0)
        return _complain("interrupted", code) if code == INTERRUPTED else code
    except _USAGE_ERROR as error:
        return _complain(getattr(error, "format_message", error.__str__)(), BAD_INPUT)
    except (KeyboardInterrupt, typer.Abort):  # some versions return the code, others raise
        return _complain("interrupted", INTERRUPTED)
    except stopping.Stopped:  # it has said so already
        return stopping.TERMINATED
    except Exception as error:
        foreseen = describe(error)
        if foreseen is None or _settings["traceback"]:
            raise
        return _complain(*foreseen)


def say(text: str) -> None:
    """Print text on stdout; file names and what stands in files cannot do more than be read."""
    for line in text.split("\n"):
        short = escaped(line) if len(line) <= LONGEST else told(line)
        output.print(short, markup=False, highlight=False)


def describe(error: Exception) -> tuple[str, int] | None:
    """Message and exit code of a foreseen error, None for a programming error."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename or 'file system'}: {error.strerror}", BAD_INPUT
    if isinstance(error, ValueError | NotImplementedError | OSError):
        return str(error) or type(error).__name__, BAD_INPUT
    if isinstance(error, ImportError):
        return f"{error}: install the missing package, or sparvar-jax[convert,bench]", FAILED
    if "RESOURCE_EXHAUSTED" in str(error):  # jax has one error class for all of XLA
        return OUT_OF_MEMORY, FAILED
    return None


def use_compilation_cache() -> Path | str | None:
    """Keep compiled programs and tuning results across processes; returns the folder.

    None, with a warning, where this user has no home to keep them in. A cache that is configured
    already (for instance by JAX_COMPILATION_CACHE_DIR) is left alone. jax's default for XLA's own
    caches stays: with XLA's kernel cache, programs that several threads had compiled stopped a
    second process on an H100 with illegal instructions.
    """
    import jax

    configured = jax.config.values.get("jax_compilation_cache_dir")
    if "://" in str(configured):  # jax writes there itself; a path would lose a slash
        folder: Path | str = str(configured)
    elif configured:
        folder = Path(configured)
    else:
        base = _cache_home()
        if base is None:
            return None
        folder = base / "sparvar_jax" / "xla"
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return folder


def _cache_home() -> Path | None:
    """Where this user keeps caches; a user of a container may have no place and no name."""
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        probe = next(place for place in (base, *base.parents) if place.exists())
        writable = os.access(probe, os.W_OK | os.X_OK)
    except RuntimeError:
        base, writable = None, False
    if not writable:
        warnings.warn(
            "compiled programs are not kept: there is no home folder to write to; set "
            "JAX_COMPILATION_CACHE_DIR to a private folder",
            stacklevel=3,
        )
        return None
    return base


class Stopwatch:
    """Seconds of the stages of a command, and how many programs came from the compile cache."""

    def __init__(self) -> None:
        self._laps: list[tuple[str, float]] = []
        self._start, self._before = time.perf_counter(), count_programs()

    def lap(self, stage: str) -> float:
        """A stage ends now; the seconds it took."""
        now = time.perf_counter()
        seconds = now - self._start
        self._laps.append((stage, seconds))
        self._start = now
        return seconds

    @property
    def programs(self) -> tuple[int, int]:
        """(asked for, found in the cache) since the start."""
        asked, found = (
            now - then for now, then in zip(count_programs(), self._before, strict=True)
        )
        return asked, found

    def tell(self) -> None:
        """One line on stderr."""
        asked, found = self.programs
        laps = ", ".join(f"{stage} in {seconds:.1f} s" for stage, seconds in self._laps)
        line = f"{laps} ({found} of {asked} programs from the compile cache)"
        errors.print(line, highlight=False, soft_wrap=True)


# How much an event adds to the programs asked for, and to those found. A kept step is not asked of
# jax's cache any more.
_EVENTS = {
    "/jax/compilation_cache/compile_requests_use_cache": (1, 0),
    "/jax/compilation_cache/cache_hits": (0, 1),
    "/sparvar_jax/programs/found": (1, 1),
}
_counted = [0, 0]


def count_programs() -> tuple[int, int]:
    """(asked for, found in the cache) of this process since the first call."""
    import jax

    if not _settings["counting"]:
        jax.monitoring.register_event_listener(_count)
        _settings["counting"] = True
    asked, found = _counted
    return asked, found


def _count(event: str, **_: object) -> None:
    for index, more in enumerate(_EVENTS.get(event, ())):
        _counted[index] += more


@contextlib.contextmanager
def progress() -> Iterator[Report]:
    """A progress callback that draws one bar a stage on stderr, and nothing off a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
    )
    quiet = not errors.is_terminal
    with Progress(*columns, console=errors, transient=True, disable=quiet) as bars:
        tasks = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(STAGES.get(stage, stage), total=total)
            bars.update(tasks[stage], completed=done, total=total)

        yield report


def _complain(message: str, code: int) -> int:
    if message:  # empty after a bare `sparvar`, which has shown its help
        print("error:", told(message), file=sys.stderr)
    return code


def _show_warning(
    shown: set[str], message, category, filename, lineno, file=None, line=None
) -> None:
    """Print a warning once: Python forgets which it showed whenever anything changes filters."""
    del category, filename, lineno, line
    text = told(message)
    if text not in shown:
        shown.add(text)
        print("warning:", text, file=file or sys.stderr)
