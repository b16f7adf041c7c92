"""Whether a kernel can be built for a call, found out by building it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable
from typing import Any

import jax
import numpy as np

from pallas_kernels.calls import Call


def lowering_reason(run: Callable[[Any], Any], call: Call, platform: str = "cuda") -> str:
    """Why `run` cannot be lowered for a call of these shapes; "" when it can. Runs nothing."""
    arrays, rebuild = _split(call)
    shapes = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in arrays]
    try:
        traced = jax.jit(lambda *arrays: run(rebuild(arrays))).trace(*shapes)
        traced.lower(lowering_platforms=(platform,))
    except Exception as error:  # whatever a compiler raises: none of it concerns the caller
        return describe(error)
    return ""


def describe(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}".partition("\n")[0]


def signature(call: Call) -> Hashable:
    """All that a kernel is built from: shapes and dtypes of arrays, and everything else whole."""
    leaves, tree = jax.tree.flatten(_fields(call))
    known = [
        (leaf.shape, str(leaf.dtype)) if isinstance(leaf, jax.Array | np.ndarray) else leaf
        for leaf in leaves
    ]
    return type(call), tree, tuple(known)


def _fields(call: Call) -> dict[str, Any]:
    return {field.name: getattr(call, field.name) for field in dataclasses.fields(call)}


def _split(call: Call) -> tuple[list[jax.Array], Callable[[Any], Call]]:
    """The arrays of a call, and the call made from others like them; numpy's are constants."""
    leaves, tree = jax.tree.flatten(_fields(call))
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)]

    def rebuild(arrays: Any) -> Call:
        given = list(leaves)
        for place, array in zip(places, arrays, strict=True):
            given[place] = array
        return type(call)(**jax.tree.unflatten(tree, given))

    return [leaves[place] for place in places], rebuild
