"""What every side-by-side comparison needs: the twin's weights, and rows of differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from jaxtyping import Array, Float

from sparvar_convert.export import to_torch
from sparvar_convert.families import Family
from sparvar_convert.rules import PER_HEAD, ConversionError, Ignore, Rule
from sparvar_convert.sources import Source
from sparvar_jax.weights.json_file import BOUNDS
from sparvar_jax.weights.numbers import real, whole
from sparvar_jax.weights.told import told

TOLERANCE = 1e-4
"""Largest difference allowed, relative to the largest value of the array.

Float32 rounding through tens of layers stays below 1e-5; a wrong formula starts at 1e-2.
"""


@dataclasses.dataclass(frozen=True)
class Row:
    """One compared array. scale: None where the array belongs to no scale.

    relative: max_abs over the twin's largest magnitude. bits: share of equal bits; exempt: bits so
    close to a tie that the tolerance may flip them; flipped: bits that differ and are not exempt.
    """

    scale: int | None
    layer: str
    max_abs: float
    relative: float
    bits: float | None = None
    exempt: int = 0
    flipped: int = 0

    def within(self, tolerance: float) -> bool:
        return self.relative <= tolerance and not self.flipped


@dataclasses.dataclass(frozen=True)
class Options:
    """What is run: the schedule by size and ratio, sampling controls, the seed of all inputs.

    Raises ValueError for numbers out of range.
    """

    size: str = "0.06M"
    aspect_ratio: float = 1.0
    guidance: float = 3.0
    temperature: float = 0.5
    seed: int = 0
    tolerance: float = TOLERANCE

    def __post_init__(self) -> None:
        for name in ("aspect_ratio", "guidance", "temperature"):
            real(name, getattr(self, name), *BOUNDS[name])
        whole("seed", self.seed, 0, (1 << 32) - 1)
        real("tolerance", self.tolerance, 0)


@dataclasses.dataclass(frozen=True)
class Sides:
    """What a comparer gets: the source for the twin, the config, and a loader of the JAX model.

    The twin should be dropped before `load` is called: large models fit memory one at a time.
    """

    source: Source
    family: Family
    config: Any
    load: Callable[[], Any]


def fill_twin(twin: torch.nn.Module, sides: Sides) -> torch.nn.Module:
    """The twin, built on the meta device, with the checkpoint's weights in float32.

    Raises ConversionError where a parameter is missing or has another shape.
    """
    twin = twin.to_empty(device="cpu").eval()
    table = sides.family.table(sides.config, list(sides.source.reader.names()))
    state = twin.state_dict()
    missing = set(state)
    with torch.no_grad():
        for key in sides.source.reader.names():
            name = table.canonical(key) if table.canonical(key) in state else key
            rule = next(iter(table.matches(key)), None)
            if name not in state:
                if isinstance(rule, Ignore):
                    continue
                raise ConversionError(f"{sides.source.name}: the twin has no {told(key, 80)}")
            value = to_torch(sides.source.reader.read(key))
            if isinstance(rule, Rule) and rule.transform is PER_HEAD:
                value = value.reshape(state[name].shape)  # a flash kernel's file has another layout
            if value.shape != state[name].shape:
                raise ConversionError(
                    f"{sides.source.name}: {key} is {list(value.shape)}, expected "
                    f"{list(state[name].shape)}"
                )
            state[name].copy_(value)
            missing.discard(name)
        for name in set(missing):
            if any(isinstance(entry, Ignore) for entry in table.matches(name)):
                state[name].zero_()
                missing.discard(name)
    if missing:
        raise ConversionError(f"{sides.source.name} lacks {', '.join(sorted(missing)[:6])}")
    return twin


def row(
    scale: int | None,
    layer: str,
    twin: Float[np.ndarray, "..."],
    ours: Float[np.ndarray | Array, "..."],
) -> Row:
    """The difference of two arrays of equal size."""
    twin, ours = np.asarray(twin, np.float64), np.asarray(ours, np.float64).reshape(twin.shape)
    largest = float(np.abs(twin - ours).max())
    if not np.isfinite(largest):
        largest = float("inf")
    return Row(scale, layer, largest, largest / max(float(np.abs(twin).max()), 1e-30))


def with_bits(found: Row, gaps: np.ndarray, equal: np.ndarray, slack: float) -> Row:
    """`found` with its bit agreement; bits whose gap is at most `slack` are exempt."""
    safe = gaps > slack
    return dataclasses.replace(
        found,
        bits=float(equal.mean()),
        exempt=int((~safe).sum()),
        flipped=int((~equal & safe).sum()),
    )
