"""What a pickle names, found without running it: to tell code and settings from damage."""

from __future__ import annotations

import contextlib
import pickletools
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

_PLAIN = re.compile(
    r"torch\.((_utils|_tensor|storage|serialization)\.)?\w+"
    r"|collections\.(OrderedDict|Counter)|_codecs\.encode"
)
_SETTINGS = re.compile(  # values that scripts keep beside weights
    r"argparse\.Namespace|types\.SimpleNamespace"
    r"|numpy(\._?core\.(multiarray|numeric))?\.(scalar|_reconstruct|_frombuffer|ndarray|dtype)"
    r"|numpy(\.dtypes)?\.\w+|pathlib(\._local)?\.(Pure)?(Posix|Windows)?Path"
    r"|datetime\.(datetime|date|time|timedelta|timezone)|decimal\.Decimal|fractions\.Fraction"
    r"|uuid\.(UUID|SafeUUID)|(builtins\.)?(set|frozenset|slice|x?range|complex|bytearray)"
    r"|torch\.torch_version\.TorchVersion"
)
_DISTRIBUTED = re.compile(r"torch\.distributed\.(\w+\.)*\w+")
_MOST_BYTES = 16 << 20
_LEGACY_PICKLES = 4  # a magic number, a protocol, facts of the system, the content


class Setting:
    """Stands for a value that torch would not make: takes anything, keeps nothing, runs nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Setting:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def stand_ins(names: list[str]) -> list[tuple[type[Setting], str]] | None:
    """For each name a class that stands for it, as `safe_globals` takes them; None for code.

    Names are those of plain values.
    """
    if not all(_SETTINGS.fullmatch(name) for name in names):
        return None
    return [
        (type(name.rpartition(".")[2], (Setting,), {}), _full(name))
        for name in dict.fromkeys(names)
    ]


def distributed(names: list[str]) -> list[str]:
    """Those of the names that stand for tensors which several processes hold together."""
    return sorted({name for name in names if _DISTRIBUTED.fullmatch(name)})


def _full(name: str) -> str:
    """The name as torch asks for it; pickles of protocol 2 know Python 2's range."""
    return name if "." in name else f"builtins.{name.removeprefix('x')}"


def foreign_name(names: list[str]) -> str | None:
    """The first of these names that is neither torch's nor plain data, None where all are."""
    return next((name for name in names if not _SETTINGS.fullmatch(name)), None)


def foreign_names(file: Path) -> list[str]:
    """All functions and classes a file's pickle names beyond what state dicts of torch need."""
    found: list[str] = []
    with contextlib.suppress(ValueError, OSError, EOFError, zipfile.BadZipFile, IndexError):
        for stream in _streams(file):
            for _ in range(_LEGACY_PICKLES):
                found += (name for name in _names(stream) if not _PLAIN.fullmatch(name))
    return found


class _Bounded:
    """A stream of which no string of a size that no name has is read."""

    def __init__(self, stream: IO[bytes] | zipfile.ZipExtFile) -> None:
        self._stream = stream

    def read(self, count: int) -> bytes:
        if count > _MOST_BYTES:
            raise ValueError(f"a string of {count} bytes")
        return self._stream.read(count)

    def readline(self) -> bytes:
        return self._stream.readline(_MOST_BYTES)


def _streams(file: Path) -> Iterator[_Bounded]:
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            yield _Bounded(stream)
        return
    with zipfile.ZipFile(file) as archive:
        for name in archive.namelist():
            if name.endswith("data.pkl"):
                with archive.open(name) as stream:
                    yield _Bounded(stream)


def _names(stream: _Bounded) -> Iterator[str]:
    """`module.name` of everything one pickle imports; a builtin by its name alone."""
    strings: list[str] = []  # what the stack and the memo were given: names come last
    memo: dict[int, str] = {}
    for operation, value, _ in pickletools.genops(stream):  # type: ignore[arg-type]
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
