"""Sampling controls from the numbers of a call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, SupportsFloat

import jax.numpy as jnp
import numpy as np

from sparvar_jax.models.sampling import Controls


def controls(
    scales: int,
    *,
    guidance: SupportsFloat | Sequence[SupportsFloat] = 3.0,
    temperature: SupportsFloat | Sequence[SupportsFloat] = 0.5,
    top_p: float = 0.97,
    top_k: int = 0,
) -> Controls:
    """Sampling controls from Python numbers: one value for all scales, or one a scale.

    Raises ValueError for a wrong count or values out of range.
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if top_k < 0:
        raise ValueError(f"top_k must be at least 0 (0 keeps everything), got {top_k}")
    guide = _per_scale("guidance", guidance, scales)
    temper = _per_scale("temperature", temperature, scales)
    if min(temper) <= 0:
        raise ValueError(f"temperature must be positive, got {min(temper)}")
    return Controls(
        jnp.asarray(guide, jnp.float32),
        jnp.asarray(temper, jnp.float32),
        jnp.asarray(top_p, jnp.float32),
        jnp.asarray(top_k, jnp.int32),
    )


def _per_scale(name: str, value: Any, scales: int) -> tuple[float, ...]:
    listed = isinstance(value, tuple | list) or np.ndim(value)
    values = tuple(float(v) for v in value) if listed else (float(value),) * scales  # type: ignore
    if len(values) != scales:
        raise ValueError(f"{name} needs one value or {scales} (one a scale), got {len(values)}")
    if not all(math.isfinite(v) for v in values):
        raise ValueError(f"{name} must be finite, got {values}")
    return values
