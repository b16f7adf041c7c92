"""What a transformer block calls for self-attention: cache, strategy and devices are inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from sparvar_jax.plans.stores import Write


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """How attention heads lie over the devices of a mesh axis; by default on one device.

    Inside `jax.shard_map` every device holds the keys and values of its own heads.
    tokens: how many tokens there are where every device has its part of them outside of attention
    (Ulysses, arXiv 2309.14509): all of its own heads' are gathered for attention, and its own
    tokens' of all heads after it. None: every device has all tokens, and does the same as all.
    """

    axis: str | None = None
    parts: int = 1
    tokens: int | None = None

    def over(self, tokens: int | None) -> HeadSplit:
        """The split where so many tokens are divided as well, or with None all are everywhere."""
        return self if self.axis is None else dataclasses.replace(self, tokens=tokens)

    def columns(self, x: Shaped[Array, "... C"], groups: int = 1) -> Shaped[Array, "... C2"]:
        """The columns that belong to this device's heads, of `groups` arrays side by side."""
        if self.axis is None:
            return x
        parted = x.reshape(*x.shape[:-1], groups, self.parts, -1)
        mine = jax.lax.dynamic_index_in_dim(
            parted, jax.lax.axis_index(self.axis), axis=parted.ndim - 2, keepdims=False
        )
        return mine.reshape(*x.shape[:-1], -1)

    def gather(self, x: Shaped[Array, "R T C"], groups: int = 1) -> Shaped[Array, "R T2 C2"]:
        """The columns of this device's heads for all tokens, from those of all heads.

        x: `groups` arrays side by side, of this device's tokens.
        """
        if self.tokens is None:
            return self.columns(x, groups)
        rows, count, width = x.shape
        parted = x.reshape(rows, count, groups, self.parts, -1).transpose(3, 0, 1, 2, 4)
        got = self._exchange(parted).swapaxes(0, 1)
        return got.reshape(rows, -1, width // self.parts)[:, : self.tokens]

    def join(self, out: Float[Array, "R H T D"]) -> Float[Array, "R H2 T2 D"]:
        """The output of all heads for this device's tokens, from all tokens of its own heads."""
        if self.axis is None:
            return out
        if self.tokens is None:
            return jax.lax.all_gather(out, self.axis, axis=1, tiled=True)
        rows, heads, _, depth = out.shape
        out = jnp.pad(out, ((0, 0), (0, 0), (0, self._missing), (0, 0)))
        parted = out.reshape(rows, heads, self.parts, -1, depth).transpose(2, 0, 3, 1, 4)
        got = self._exchange(parted).transpose(1, 0, 3, 2, 4)
        return got.reshape(rows, self.parts * heads, -1, depth)

    def own_tokens(self, x: Shaped[Array, "R T C"]) -> Shaped[Array, "R T2 C"]:
        """This device's tokens; zeros fill up the last device's."""
        if self.tokens is None or self.axis is None:
            return x
        x = jnp.pad(x, ((0, 0), (0, self._missing), (0, 0)))
        count = x.shape[1] // self.parts
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * count, count, axis=1)

    def all_tokens(self, x: Shaped[Array, "R T C"]) -> Shaped[Array, "R T2 C"]:
        """The tokens of all devices."""
        if self.tokens is None or self.axis is None:
            return x
        return jax.lax.all_gather(x, self.axis, axis=1, tiled=True)[:, : self.tokens]

    @property
    def _missing(self) -> int:
        """How many tokens more could be divided evenly."""
        return 0 if self.tokens is None else -self.tokens % self.parts

    def _exchange(self, x: Shaped[Array, "P ..."]) -> Shaped[Array, "P ..."]:
        """Entry p of every device to device p; there in the order of devices."""
        return jax.lax.all_to_all(x, self.axis, 0, 0)


Run = Callable[[Any, Any], Any]
"""(residual stream, positions) -> the residual stream with one branch's update left undone."""


@dataclasses.dataclass(frozen=True)
class Attend:
    """Self-attention of one layer, and how its branches are run.

    run: from what writes this scale's keys and values to the output of this device's heads.
    around: (branch name, how to run it, stream, positions) -> the stream; None just runs it.
    """

    run: Callable[[Write], jax.Array]
    heads: HeadSplit = HeadSplit()
    around: Callable[[str, Run, Any, Any], Any] | None = None

    def branch(self, name: str, run: Run, stream: Any, positions: Any) -> Any:
        """The stream after one branch of a block: "self_attention", "cross_attention" or
        "feed_forward". Rules about tokens and rows of a branch do their work here.
        """
        if self.around is None:
            return run(stream, positions)
        return self.around(name, run, stream, positions)

    def __call__(self, write: Write) -> Float[Array, "R H T D"]:
        """The attention output of all heads, of the tokens that this device has."""
        return self.heads.join(self.run(write))
