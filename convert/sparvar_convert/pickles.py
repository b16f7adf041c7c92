"""What a pickle names, found without running it: to tell code from damage when torch refuses."""

from __future__ import annotations

import contextlib
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_PLAIN = re.compile(
    r"torch\.((_utils|_tensor|storage)\.)?\w+|collections\.OrderedDict|argparse\.Namespace"
)
_LEGACY_PICKLES = 4  # a magic number, a protocol, facts of the system, the content


def foreign_name(file: Path) -> str | None:
    """The first function or class a file's pickle names beyond what state dicts of torch need.

    None where there is none, or where the file is no whole pickle or zip archive of one.
    """
    with contextlib.suppress(ValueError, OSError, EOFError, zipfile.BadZipFile, IndexError):
        for stream in _streams(file):
            for _ in range(_LEGACY_PICKLES):
                for name in _names(stream):
                    if not _PLAIN.fullmatch(name):
                        return name
    return None


def _streams(file: Path) -> Iterator[IO[bytes]]:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            yield stream
        return
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as stream:
                    yield stream


def _names(stream: IO[bytes]) -> Iterator[str]:
    """`module.name` of everything one pickle imports; a builtin by its name alone."""
    strings: list[str] = []  # what the stack and the memo were given: names come last
    memo: dict[int, str] = {}
    for operation, value, _ in pickletools.genops(stream):
        if operation.name in ("GLOBAL", "INST"):
            yield _dotted(*str(value).split(" ", 1))
        elif operation.name == "STACK_GLOBAL":
            yield _dotted(strings[-2], strings[-1])
        elif operation.name == "MEMOIZE":
            memo[len(memo)] = strings[-1] if strings else ""
        elif operation.name in ("BINGET", "LONG_BINGET") and isinstance(value, int):
            strings.append(memo.get(value, ""))
        elif isinstance(value, str):
            strings.append(value)


def _dotted(module: str, name: str) -> str:
    return name if module in ("builtins", "__builtin__") else f"{module}.{name}"
