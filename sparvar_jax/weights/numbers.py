"""One number, from whatever library or line it comes, as Python's own and within bounds."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np

from sparvar_jax.weights.told import shown


def whole(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> int:
    """A whole number in low..high, ends included; 2.0 and True are none.

    Scalars and arrays without dimensions of numpy and jax are numbers as well. Raises ValueError
    with the name, what was expected and what came.
    """
    try:
        if isinstance(value, bool):
            raise TypeError
        found = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be a whole number, got {shown(value)}") from None
    if not low <= found <= high:
        raise ValueError(f"{name} must lie in {low}..{high}, got {shown(found)}")
    return found


def real(name: str, value: Any, low: float = -math.inf, high: float = math.inf) -> float:
    """A finite number in [low, high]; text such as "2.5" counts, True does not. ValueError."""
    try:
        if isinstance(value, bool | np.bool_ | bytes):
            raise TypeError
        found = float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, got {shown(value)}") from None
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise ValueError(f"{name} must be finite, got {shown(value)}")
    if not low <= found <= high:
        raise ValueError(f"{name} must lie in [{low:g}, {high:g}], got {shown(found)}")
    return found


def several(value: Any) -> bool:
    """Whether a value is a list of some kind and not one thing."""
    return not isinstance(value, str | bytes) and (
        isinstance(value, Sequence) or np.ndim(value) > 0
    )
