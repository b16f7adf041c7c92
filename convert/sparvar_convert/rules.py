"""Strict, invertible rules that carry tensors from PyTorch names to parameter paths and back.

A `Table` is a list of `Rule`s (tensors that are converted) and `Ignore`s (tensors left behind on
purpose, each with its reason). Names on both sides are templates: `{i}` stands for a number and
`{name:regex}` for what the regex matches (give it on one side); both sides of a rule use the same
fields, so one table reads a checkpoint and writes it back bit for bit. Every key of a source must
match exactly one entry; `sparvar_convert.stream` enforces that and runs the tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import ml_dtypes
import numpy as np

from sparvar_jax.weights.told import told

FLOAT_DTYPES = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))


class ConversionError(ValueError):
    """A source that cannot be converted: one line saying what, expected, found and the mend.

    Names in it come from files, so the line is cut and control characters are escaped.
    """

    def __init__(self, message: str) -> None:
        super().__init__(told(message))


@dataclass(frozen=True)
class Transform:
    """Named pair of exact array functions; `inverse(forward(x))` is `x` bit for bit."""

    name: str
    forward: Callable[[np.ndarray], np.ndarray]
    inverse: Callable[[np.ndarray], np.ndarray]

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Shape that `forward` would give; raises ValueError where the rank does not fit."""
        return self.forward(np.broadcast_to(np.float32(0), shape)).shape


def _same(array: np.ndarray) -> np.ndarray:
    return array


def permute(name: str, *axes: int) -> Transform:
    """Axis permutation; the input must have exactly `len(axes)` axes."""
    back = tuple(int(axis) for axis in np.argsort(axes))
    return Transform(name, lambda a: a.transpose(axes), lambda a: a.transpose(back))


def squeeze(*axes: int) -> Transform:
    """Removal of the named axes, which must have size 1."""
    name = f"squeeze{axes}"
    return Transform(name, lambda a: np.squeeze(a, axes), lambda a: np.expand_dims(a, axes))


def _per_head(array: np.ndarray) -> np.ndarray:
    if array.ndim != 4 or array.shape[0] != 1 or array.shape[3] != 1 or 1 not in array.shape[1:3]:
        raise ValueError(f"expected [1, H, 1, 1] or [1, 1, H, 1], got {list(array.shape)}")
    return array.reshape(-1)


KEEP = Transform("keep", _same, _same)
PER_HEAD = Transform("one a head", _per_head, lambda a: a[None, :, None, None])
"""Released code keeps [1, H, 1, 1], with its own flash kernel [1, 1, H, 1]; the first is written
back."""
TRANSPOSE = permute("transpose", 1, 0)
CONV = permute("OIHW to HWIO", 2, 3, 1, 0)
POINTWISE = Transform(
    "1x1 convolution to dense kernel",
    lambda a: np.squeeze(a, (2, 3)).transpose(1, 0),
    lambda a: a.transpose(1, 0)[:, :, None, None],
)


class _Template(NamedTuple):
    """Compiled name template: a regex with one group per field, and a format string."""

    pattern: re.Pattern[str]
    text: str


NUMBER = "[0-9]{1,9}"
"""A number in a name: longer ones are of no model, and take long to read."""
_FIELD = re.compile(r"\{(\w+)(?::([^{}]+))?\}")


@cache
def _compile(template: str, partner: str = "") -> _Template:
    """Template whose fields without a regex borrow the one of `partner`'s field, if any."""
    regexes = {field[1]: field[2] for field in _FIELD.finditer(partner + template) if field[2]}
    pattern, text, end = "", "", 0
    for field in _FIELD.finditer(template):
        literal = template[end : field.start()]
        pattern += f"{re.escape(literal)}(?P<{field[1]}>{regexes.get(field[1], NUMBER)})"
        text += f"{literal}{{{field[1]}}}"
        end = field.end()
    return _Template(re.compile(pattern + re.escape(template[end:])), text + template[end:])


def translate(name: str, source: str, target: str) -> str | None:
    """Name carried from template `source` to template `target`; None where it does not match."""
    match = _compile(source, target).pattern.fullmatch(name)
    return None if match is None else _compile(target).text.format(**match.groupdict())


@dataclass(frozen=True)
class Rule:
    """One family of tensors: PyTorch name template, parameter path template, transform."""

    source: str
    target: str
    transform: Transform = KEEP

    def __post_init__(self) -> None:
        fields = [set(_compile(name).pattern.groupindex) for name in (self.source, self.target)]
        if fields[0] != fields[1]:
            raise ValueError(f"{self.source!r} and {self.target!r} must use the same fields")


@dataclass(frozen=True)
class Ignore:
    """Tensors left behind on purpose.

    `check(array)` returns a complaint or None and runs on import. On export the tensor is
    recreated as `recreate(parameter)` for every parameter path that matches `like`.
    """

    source: str
    reason: str
    check: Callable[[np.ndarray], str | None] | None = None
    like: str | None = None
    recreate: Callable[[np.ndarray], np.ndarray] | None = None


def require_numbers(names: Collection[str], what: str, count: int) -> None:
    """ConversionError where numbers in names count more things than there are names."""
    if count > len(names):
        raise ConversionError(
            f"the names count {count} {what}, but there are only {len(names)} tensors: a name is "
            "damaged, use the complete checkpoint"
        )


def require_rank(shape: Sequence[int], key: str, rank: int) -> tuple[int, ...]:
    """The shape, if it has as many axes; else a ConversionError that names the key."""
    if len(shape) != rank:
        raise ConversionError(f"{key} has shape {list(shape)}, expected {rank} axes")
    return tuple(shape)


def must_be_zero(array: np.ndarray) -> str | None:
    """Complaint unless every entry is zero; for buffers the model never trains."""
    return "must be all zero" if np.any(array != 0) else None


@dataclass(frozen=True)
class Table:
    """Rules of one kind of checkpoint.

    `canonical` renames a released key to the name the rules know (for instance numbering blocks
    through all chunks), `released` is its inverse.
    """

    kind: str
    rules: tuple[Rule, ...]
    ignored: tuple[Ignore, ...] = ()
    canonical: Callable[[str], str] = str
    released: Callable[[str], str] = str

    def matches(self, key: str) -> list[Rule | Ignore]:
        """Entries whose source template matches a released key."""
        name = self.canonical(key)
        return [
            entry
            for entry in (*self.rules, *self.ignored)
            if _compile(
                entry.source, entry.target if isinstance(entry, Rule) else entry.like or ""
            ).pattern.fullmatch(name)
        ]
