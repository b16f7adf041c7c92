"""Numbers of a call, from whatever library they come: one normaliser for each kind."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, SupportsFloat

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Key

from sparvar_jax.models.sampling import KEY_KIND

PerScale = SupportsFloat | Sequence[SupportsFloat]
SEEDS = 1 << 32
OFF = "off"


def whole_numbers(name: str, value: Any) -> list[Any]:
    """One whole number or several as Python's; None stays; 2.7 is refused."""
    several = not isinstance(value, str) and (isinstance(value, Sequence) or np.ndim(value))
    try:
        given: list[Any] = list(value) if several else [value]
        return [None if number is None else operator.index(number) for number in given]
    except TypeError:
        raise ValueError(f"{name} must be whole numbers, got {value!r}") from None


def numbers(name: str, value: Any) -> float | tuple[float, ...]:
    """A float, or a tuple of them: one a scale. Scalars of numpy and jax are numbers as well."""
    try:
        if not isinstance(value, str) and (isinstance(value, Sequence) or np.ndim(value)):
            return tuple(float(v) for v in value)
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{name} must be a number, or one a scale, got {value!r}") from None


def guidance_of(value: Any, off: float) -> float | tuple[float, ...]:
    """Guidance as numbers. off: the family's number for none, which "off" and False mean."""
    if value is False or (isinstance(value, str) and value == OFF):
        return off
    return numbers("guidance", value)


def image_keys(seed: Any, batch: int) -> Key[Array, "B"]:
    """One random key a picture: image b draws from seed + b, or from its own of several seeds.

    Raises ValueError for seeds that are no whole numbers in 0..2^32 - 1, or too few of them.
    """
    if not isinstance(seed, Sequence) and not np.ndim(seed):
        (first,) = whole_numbers("seed", seed)
        if first is None or not 0 <= first <= SEEDS - batch:
            raise ValueError(f"seed must lie in 0..{SEEDS - batch}, got {first}")
        seeds: list[Any] = [first + image for image in range(batch)]
    else:
        seeds = whole_numbers("seeds", seed)
        if len(seeds) != batch:
            raise ValueError(f"got {len(seeds)} seeds for {batch} pictures")
        if any(one is None or not 0 <= one < SEEDS for one in seeds):
            raise ValueError(f"seeds must lie in 0..{SEEDS - 1}, got {seeds}")
    # Not through vmap: a key must be what `sampling.image_keys` makes of the same seed.
    return jnp.stack([jax.random.key(np.uint32(one), impl=KEY_KIND) for one in seeds])


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
            width, height = (float(part) for part in ratio.split(":"))
            value = width / height
        else:
            value = float(ratio)
    except (ValueError, ZeroDivisionError, TypeError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"aspect ratio must be W:H such as 16:9, or a positive number: {ratio!r}")
    return value
