"""Which kernels serve the attentions of a plan, on the device that calls go to."""

from __future__ import annotations

from typing import Any

import jax

import pallas_kernels
from pallas_kernels import backends, support
from sparvar_jax.plans.plan import Plan

OPS = {
    "dense": "attention",
    "cs4a decision": "attention_column_sums",
    "cs4a": "column_sparse_attention",
    "csla blocks 64": "block_sparse_attention",
    "csla blocks 128": "block_sparse_attention",
    "csla boxes": "window_attention",
}
"""Attention of a plan, by name -> the operation that computes it."""


def implementations(plan: Plan, config: Any, batch: int = 1) -> dict[str, str]:
    """The backend of every attention of a plan, by the attention's name.

    config: of the transformer (heads, head_dim, precision). Of one that differs among scales, the
    last scale's counts.
    """
    used = {}
    for index, step in enumerate(plan.steps):
        for segment in step.segments:
            name = segment.attention.name
            if name not in OPS:
                continue
            place = plan.place(index, segment.layers[0])
            rows = batch * step.cached_rows(segment)
            shape = (rows, config.heads, place.queries, config.head_dim)
            query = jax.ShapeDtypeStruct(shape, config.precision.compute)
            shape = (*shape[:2], place.rows.total, shape[3])
            keys = jax.ShapeDtypeStruct(shape, config.precision.compute)
            used[name] = pallas_kernels.implementation_used(
                OPS[name], query, keys, keys, gaps=place.gaps
            )
    return used


def told(plan: Plan, config: Any, batch: int = 1) -> str:
    """`implementations` in one line, with the device and the path that was chosen for it."""
    device, path = support.device_of(), backends.path()
    used = implementations(plan, config, batch)
    served = ", ".join(f"{name} {backend}" for name, backend in used.items())
    chosen = f" (path {path})" if path else ""
    return f"{served or 'unknown'} on {device.kind or device.platform}{chosen}"
