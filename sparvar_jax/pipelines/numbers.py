"""Numbers of a call, from whatever library they come: one normaliser for each kind."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sparvar_jax.models.sampling import keys_of
from sparvar_jax.weights.json_file import BOUNDS
from sparvar_jax.weights.numbers import real, several, whole
from sparvar_jax.weights.told import shown

PerScale = SupportsFloat | Sequence[SupportsFloat]
SEEDS = 1 << 32
OFF = "off"


def whole_numbers(name: str, value: Any) -> list[Any]:
    """One whole number or several as Python's; None stays; 2.7 is refused."""
    try:
        given: list[Any] = list(value) if several(value) else [value]
        return [None if number is None else whole(name, number) for number in given]
    except ValueError:
        raise ValueError(f"{name} must be whole numbers, got {shown(value)}") from None


def numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """A float, or a tuple of them: one a scale. Scalars of numpy and jax are numbers as well.

    Raises ValueError for anything else, and outside the bounds that configurations have, too.
    """
    bounds = BOUNDS.get(name, (-math.inf, math.inf))
    if not several(value):
        return real(name, value, *bounds)
    return tuple(real(name, one, *bounds) for one in value)


def guidance_of(value: Any, off: float) -> float | tuple[float, ...]:
    """Guidance as numbers. off: the family's number for none, which "off" and False mean."""
    if value is False or (isinstance(value, str) and value == OFF):
        return off
    return numbers("guidance", value)


def flag(name: str, value: Any) -> bool:
    """True or False, numpy's as well; ValueError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def first_seed(seed: Any, batch: int) -> int:
    """The seed of the first of a batch of pictures; ValueError unless all seeds are in range."""
    (first,) = whole_numbers("seed", seed)
    if first is None or not 0 <= first <= SEEDS - batch:
        raise ValueError(f"seed must lie in 0..{SEEDS - batch}, got {shown(first)}")
    return first


def image_keys(seed: Any, batch: int) -> Key[Array, "B"]:
    """One random key a picture: image b draws from seed + b, or from its own of several seeds.

    Raises ValueError for seeds that are no whole numbers in 0..2^32 - 1, or too few of them.
    """
    if not several(seed):
        first = first_seed(seed, batch)
        seeds: list[Any] = [first + image for image in range(batch)]
    else:
        seeds = whole_numbers("seeds", seed)
        if len(seeds) != batch:
            raise ValueError(f"got {len(seeds)} seeds for {batch} pictures")
        if any(one is None or not 0 <= one < SEEDS for one in seeds):
            raise ValueError(f"seeds must lie in 0..{SEEDS - 1}, got {shown(seeds)}")
    return keys_of(seeds)


def seeds_of(generator: Any) -> int | list[int]:
    """The seed that a random generator stands for, or one each of several.

    Taken are whole numbers, keys of jax, generators of numpy (which move on) and of PyTorch (whose
    initial seed counts, so that the same generator draws the same picture twice).
    """
    if isinstance(generator, list | tuple):
        return [_seed_of(one) for one in generator]
    return _seed_of(generator)


def _seed_of(generator: Any) -> int:
    if hasattr(generator, "initial_seed"):
        return generator.initial_seed() % SEEDS
    if isinstance(generator, np.random.Generator):
        return int(generator.integers(SEEDS))
    if isinstance(generator, jax.Array):
        typed = jnp.issubdtype(generator.dtype, jax.dtypes.prng_key)
        key = generator if typed else jax.random.wrap_key_data(generator)
        return int(jax.random.bits(key, (), np.uint32))
    (seed,) = whole_numbers("generator", generator)
    return seed


def parse_ratio(ratio: float | str) -> float:
    """Width / height from a number or from "W:H"; ValueError for anything else."""
    try:
        if isinstance(ratio, str) and ":" in ratio:
            width, height = (real("aspect ratio", part) for part in ratio.split(":"))
            value = width / height
        else:
            value = real("aspect ratio", ratio)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    low, high = BOUNDS["aspect_ratio"]
    if not low <= value <= high:
        raise ValueError(
            f"aspect ratio must be W:H such as 16:9, or a positive number: {shown(ratio)}"
        )
    return value
