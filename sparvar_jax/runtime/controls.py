"""Sampling controls from the numbers of a call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, SupportsFloat

import jax.numpy as jnp

from sparvar_jax.models.sampling import Controls
from sparvar_jax.weights.json_file import BOUNDS
from sparvar_jax.weights.numbers import real, several, whole
from sparvar_jax.weights.told import shown

COLDEST = 1e-10
"""Lowest temperature: below it, logits divided by it could pass float32."""


def controls(
    scales: int,
    *,
    guidance: SupportsFloat | Sequence[SupportsFloat] = 3.0,
    temperature: SupportsFloat | Sequence[SupportsFloat] = 0.5,
    top_p: float = 0.97,
    top_k: int = 0,
) -> Controls:
    """Sampling controls from Python numbers: one value for all scales, or one a scale.

    Raises ValueError for a wrong count or values that are no numbers or out of range.
    """
    kept = real("top_p", top_p)
    if not 0 < kept <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {kept:g}")
    count = whole("top_k", top_k)
    if not 0 <= count <= BOUNDS["top_k"][1]:
        raise ValueError(f"top_k must be at least 0 (0 keeps everything), got {shown(count)}")
    guide = _per_scale("guidance", guidance, scales)
    temper = _per_scale("temperature", temperature, scales)
    if min(temper) < COLDEST:
        raise ValueError(f"temperature must be positive, at least {COLDEST}, got {min(temper):g}")
    return Controls(
        jnp.asarray(guide, jnp.float32),
        jnp.asarray(temper, jnp.float32),
        jnp.asarray(kept, jnp.float32),
        jnp.asarray(count, jnp.int32),
    )


def _per_scale(name: str, value: Any, scales: int) -> tuple[float, ...]:
    given = value if several(value) else (value,) * scales
    if len(given) != scales:
        raise ValueError(f"{name} needs one value or {scales} (one a scale), got {len(given)}")
    return tuple(real(name, one, *BOUNDS[name]) for one in given)
