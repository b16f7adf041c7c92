"""Run a rule table over a checkpoint, one tensor at a time, in either direction.

Every key of a source must match exactly one entry of the table and every expected parameter must
be filled exactly once, with the right shape. All violations are gathered from names and shapes
alone, before any data is read, and raised once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from sparvar_convert.rules import FLOAT_DTYPES, ConversionError, Ignore, Table, Transform, translate
from sparvar_jax.weights.told import listed

_LONGEST = 120

Progress = Callable[[str, int, int], None]
"""(what was done, how many are done, how many there are)."""


@runtime_checkable
class Reader(Protocol):
    """Source of named tensors; shapes and dtypes are known without reading any data."""

    def names(self) -> Iterable[str]: ...

    def shape(self, key: str) -> tuple[int, ...]: ...

    def dtype(self, key: str) -> np.dtype: ...

    def read(self, key: str) -> np.ndarray: ...


@runtime_checkable
class Shaped(Protocol):
    """Anything with a shape: an array, a `jax.ShapeDtypeStruct`."""

    @property
    def shape(self) -> tuple[int, ...]: ...


class Move(NamedTuple):
    """One tensor's way: released key, parameter path, transform."""

    key: str
    path: str
    transform: Transform


class Plan(NamedTuple):
    """Checked work list of a conversion, and the ignored keys with their entries."""

    moves: tuple[Move, ...]
    ignored: tuple[tuple[str, Ignore], ...]


class Converted(NamedTuple):
    """What a conversion did, for the manifest."""

    tensors: int
    parameters: int
    dtypes: dict[str, int]
    ignored: dict[str, str]


class _Problems:
    """Violations by headline, in the order found."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def add(self, headline: str, item: str) -> None:
        self.found.setdefault(headline, []).append(item)

    def raise_if_any(self, kind: str, mend: str) -> None:
        if not self.found:
            return
        parts = []
        for headline, items in self.found.items():
            parts.append(f"{len(items)} {headline}: {listed(items, each=_LONGEST)}")
        raise ConversionError(f"{kind} checkpoint does not fit: {'; '.join(parts)}. {mend}")


def plan_conversion(table: Table, reader: Reader, expected: Mapping[str, Shaped]) -> Plan:
    """Match every key and every parameter; raise one ConversionError with all violations."""
    problems, moves, ignored = _Problems(), [], []
    filled: dict[str, str] = {}
    for key in reader.names():
        found = table.matches(key)
        if len(found) != 1:
            headline = "keys match more than one rule" if found else "unknown keys"
            problems.add(headline, f"{key} {list(reader.shape(key))}")
        elif isinstance(found[0], Ignore):
            ignored.append((key, found[0]))
        else:
            path = translate(table.canonical(key), found[0].source, found[0].target)
            assert path is not None
            _check_move(problems, reader, expected, filled, Move(key, path, found[0].transform))
            moves.append(Move(key, path, found[0].transform))
    for path in expected:
        if path not in filled:
            problems.add("parameters left unfilled", _wanted(table, path, expected[path]))
    problems.raise_if_any(table.kind, "Use the complete checkpoint of this model.")
    return Plan(tuple(moves), tuple(ignored))


def _wanted(table: Table, path: str, shape: Shaped) -> str:
    """Unfilled parameter, with the released key that should have carried it."""
    for rule in table.rules:
        name = translate(path, rule.target, rule.source)
        if name is not None:
            return f"{path} {list(shape.shape)} (from key {table.released(name)})"
    return f"{path} {list(shape.shape)}"


def _check_move(
    problems: _Problems,
    reader: Reader,
    expected: Mapping[str, Shaped],
    filled: dict[str, str],
    move: Move,
) -> None:
    key, path, transform = move
    have = tuple(reader.shape(key))
    if path not in expected:
        problems.add("keys beyond the model", f"{key} {list(have)} (for {path})")
        return
    if path in filled:
        problems.add("parameters filled twice", f"{path} (by {filled[path]} and {key})")
    filled[path] = key
    want = tuple(expected[path].shape)
    try:
        got = transform.shape(have)
    except ValueError:
        got = None
    if got != want:
        problems.add(
            "wrong shapes",
            f"{key} {list(have)} gives {path} "
            f"{'nothing' if got is None else list(got)} by {transform.name}, expected {list(want)}",
        )
    if reader.dtype(key) not in FLOAT_DTYPES:
        problems.add(
            "unsupported dtypes",
            f"{key} {reader.dtype(key).name}, expected float32, float16 or bfloat16",
        )


def convert_tensors(
    table: Table,
    reader: Reader,
    expected: Mapping[str, Shaped],
    write: Callable[[str, np.ndarray], None],
    progress: Progress | None = None,
) -> Converted:
    """Stream every tensor through its rule into `write(path, array)`, one at a time.

    Args:
        expected: parameter path -> anything with `.shape`.
        progress: called as (parameter path, done, total) after each write.

    Raises:
        ConversionError: names or shapes do not fit (nothing was written), or a tensor holds NaN
            or infinity, or an ignored buffer is not what the model recreates.
    """
    plan = plan_conversion(table, reader, expected)
    for key, entry in plan.ignored:
        complaint = entry.check(reader.read(key)) if entry.check else None
        if complaint:
            raise ConversionError(f"{table.kind} checkpoint: {key} {complaint} ({entry.reason})")
    dtypes: dict[str, int] = {}
    parameters = 0
    for done, (key, path, transform) in enumerate(plan.moves, 1):
        array = reader.read(key)
        require_finite(array, key)
        write(path, np.asarray(transform.forward(array), order="C"))
        dtypes[array.dtype.name] = dtypes.get(array.dtype.name, 0) + 1
        parameters += array.size
        if progress is not None:
            progress(path, done, len(plan.moves))
    reasons = {key: entry.reason for key, entry in plan.ignored}
    return Converted(len(plan.moves), parameters, dtypes, reasons)


def require_finite(array: np.ndarray, key: str) -> None:
    """ConversionError naming `key` where the array holds NaN or infinity."""
    flat = array.reshape(-1)
    for start in range(0, flat.size, 1 << 24):  # in slices: the mask costs a byte per entry
        if not np.isfinite(flat[start : start + (1 << 24)]).all():
            raise ConversionError(
                f"{key} holds NaN or infinity; the checkpoint is damaged or was saved by a "
                "diverged run, use another one"
            )


def export_tensors(
    table: Table, paths: Iterable[str], load: Callable[[str], Any]
) -> Iterator[tuple[str, np.ndarray]]:
    """Released keys with their tensors, one at a time: the inverse of `convert_tensors`.

    Raises:
        ConversionError: a parameter path matches no rule or several.
    """
    for path in paths:
        rules = [r for r in table.rules if translate(path, r.target, r.source) is not None]
        if len(rules) != 1:
            raise ConversionError(f"{path} matches {len(rules)} {table.kind} rules, expected one")
        array = np.asarray(load(path))
        name = translate(path, rules[0].target, rules[0].source)
        assert name is not None
        yield table.released(name), np.asarray(rules[0].transform.inverse(array), order="C")
        for entry in table.ignored:
            if entry.like is not None and entry.recreate is not None:
                buffer = translate(path, entry.like, entry.source)
                if buffer is not None:
                    yield table.released(buffer), entry.recreate(array)
