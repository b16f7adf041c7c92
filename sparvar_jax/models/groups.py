"""Rows of a batch worked through group after group: memory of one group serves them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from pallas_kernels import Eight

TOKENS_AT_ONCE = 1 << 13
"""Both rows of one picture of 1024x1024 fill an H100; more at once take memory, save no time."""
PICTURE = 2
"""Rows of one picture, which always go together: conditional and unconditional."""


def at_once(count: int, tokens: int, least: int = 1) -> int:
    """How many of `count` things of so many tokens each are worked through together.

    As many as fill a device, but `least`; groups are of nearly a size.
    """
    most = max(least, TOKENS_AT_ONCE // tokens)
    return -(-count // -(-count // most))


def in_groups(run: Callable[[Any], Any], x: Any, group: int) -> Any:
    """`run` over groups of what leads every array of `x`, one after the other; results as of all.

    A last group may be smaller. Where there is one group alone, it is run as it is.
    """
    count = len(jax.tree.leaves(x)[0])
    if group >= count:
        return run(x)
    whole = count // group * group

    def grouped(leaf: jax.Array) -> jax.Array:
        return leaf[:whole].reshape(-1, group, *leaf.shape[1:])

    out = jax.lax.map(run, jax.tree.map(grouped, x))
    out = jax.tree.map(lambda leaf: leaf.reshape(whole, *leaf.shape[2:]), out)
    if whole == count:
        return out
    rest = run(jax.tree.map(lambda leaf: leaf[whole:], x))
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), out, rest)


def by_rows(
    layer: Callable[[Any], Shaped[Array, "R2 T C"]], x: Shaped[Array, "R T C"] | Eight
) -> Shaped[Array, "R T C"]:
    """A layer that sees every token by itself, over so many rows at once that they fill a device.

    What it holds between its products is then of `TOKENS_AT_ONCE` tokens, however large the batch.
    Its results are as wide as x and take x's place, group after group: were there a buffer of zeros
    for them, XLA would make those of all layers at the start of a step, and hold them all.
    """
    rows, tokens = (x.values if isinstance(x, Eight) else x).shape[:2]
    group = at_once(rows, tokens, PICTURE)
    if group == rows:
        return layer(x)
    result = jax.eval_shape(lambda: layer(_rows(x, 0, group)))
    apart = isinstance(x, Eight) or result.dtype != x.dtype
    out = (x.values if isinstance(x, Eight) else x).astype(result.dtype)

    def put(out: jax.Array, start: Any, count: int) -> jax.Array:
        part = layer(_rows(x if apart else out, start, count))
        return jax.lax.dynamic_update_slice_in_dim(out, part, start, 0)

    whole, rest = divmod(rows, group)
    out = jax.lax.fori_loop(0, whole, lambda n, out: put(out, n * group, group), out)
    return put(out, whole * group, rest) if rest else out


def _rows(x: Any, start: Any, count: int) -> Any:
    """So many rows of x."""
    if isinstance(x, Eight):
        scale = jax.lax.dynamic_slice_in_dim(x.scale, start, count, 1)
        return Eight(_rows(x.values, start, count), scale)
    return jax.lax.dynamic_slice_in_dim(x, start, count, 0)
