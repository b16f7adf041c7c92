"""What a transformer block calls for self-attention: cache, strategy and devices are inside."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float, Shaped

from sparvar_jax.plans.stores import Write


@dataclasses.dataclass(frozen=True)
class HeadSplit:
    """How attention heads lie over the devices of a mesh axis; by default on one device.

    Inside `jax.shard_map` every device holds the keys and values of its own heads. Everything else
    of a block is the same on all of them.
    """

    axis: str | None = None
    parts: int = 1

    def columns(self, x: Shaped[Array, "... C"], groups: int = 1) -> Shaped[Array, "... C2"]:
        """The columns that belong to this device's heads, of `groups` arrays side by side."""
        if self.axis is None:
            return x
        parted = x.reshape(*x.shape[:-1], groups, self.parts, -1)
        mine = jax.lax.dynamic_index_in_dim(
            parted, jax.lax.axis_index(self.axis), axis=parted.ndim - 2, keepdims=False
        )
        return mine.reshape(*x.shape[:-1], -1)

    def join(self, out: Float[Array, "R H T D"]) -> Float[Array, "R H2 T D"]:
        """The output of all heads, from this device's."""
        if self.axis is None:
            return out
        return jax.lax.all_gather(out, self.axis, axis=1, tiled=True)


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
        """The attention output of all heads."""
        return self.heads.join(self.run(write))
