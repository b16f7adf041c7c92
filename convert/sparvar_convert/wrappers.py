"""Names as the model itself gives them: what training wrapped around it is taken off the keys."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from sparvar_convert.rules import ConversionError
from sparvar_convert.stream import Reader
from sparvar_jax.weights.told import listed

_ANYWHERE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
"""Steps that only wrappers add to names."""
_SHARED = "module"
"""The step that is taken off where all keys begin with it; parts of a model may be named so."""


class Unwrapped:
    """A reader under shorter names."""

    def __init__(self, reader: Reader, keys: dict[str, str]) -> None:
        self._reader, self._keys = reader, keys

    def names(self) -> Iterable[str]:
        return self._keys.keys()

    def shape(self, key: str) -> tuple[int, ...]:
        return self._reader.shape(self._keys[key])

    def dtype(self, key: str) -> np.dtype:
        return self._reader.dtype(self._keys[key])

    def read(self, key: str) -> np.ndarray:
        return self._reader.read(self._keys[key])


def unwrap(reader: Reader, name: str) -> tuple[Reader, str]:
    """The reader without wrappers in its keys, and what was taken off, in words ("" for nothing).

    Raises ConversionError where two keys become one.
    """
    names = list(reader.names())
    steps = [_bare(key.split(".")) for key in names]
    taken = {step for key in names for step in key.split(".") if step in _ANYWHERE}
    shared = min(map(_leading, steps), default=0)
    if shared:
        steps = [path[shared:] for path in steps]
        taken.add(_SHARED)
    if not taken:
        return reader, ""
    keys = {".".join(path): key for path, key in zip(steps, names, strict=True)}
    if len(keys) != len(names):
        kept = set(keys.values())
        twice = [key for key in names if key not in kept]
        raise ConversionError(
            f"{name}: keys are the same without wrappers: {listed(twice)}; save one set of weights"
        )
    return Unwrapped(reader, keys), f"keys without {', '.join(f'{s}.' for s in sorted(taken))}"


def _leading(path: list[str]) -> int:
    """How many steps at the beginning, the last one apart, are the shared wrapper's."""
    others = (index for index, step in enumerate(path[:-1]) if step != _SHARED)
    return next(others, len(path) - 1)


def _bare(path: list[str]) -> list[str]:
    return [step for step in path[:-1] if step not in _ANYWHERE] + path[-1:]
