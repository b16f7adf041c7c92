"""The residual stream between blocks, with the update that is still to be made."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

import pallas_kernels
from pallas_kernels import Eight
from pallas_kernels.api import Implementation
from pallas_kernels.xla.fused import rounded


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("x", "branch", "table", "bias"),
    meta_fields=("index",),
)
@dataclasses.dataclass(frozen=True)
class Stream:
    """The residual stream between blocks, in its dtype: `x + gain * (branch + bias)`.

    A block leaves its last update undone, so that the norm that opens the next block makes both in
    one pass over memory. The gain is row `index` of `table`, of which the first R rows are meant;
    without a table it is one, without a branch the stream is x.
    """

    x: Float[Array, "R T C"]
    branch: Float[Array, "R T C"] | None = None
    table: Float[Array, "R2 K C"] | None = None
    bias: Float[Array, "C"] | None = None
    index: int = 0

    def settled(self) -> Float[Array, "R T C"]:
        """The stream as one array."""
        return self.x if self.branch is None else updated(self.x, self.update())

    def update(self) -> Float[Array, "R T C"]:
        """What is still to be added to x."""
        assert self.branch is not None
        assert self.bias is not None
        branch = self.branch + self.bias.astype(self.branch.dtype)
        return (
            branch if self.table is None else self.table[: len(self.x), self.index, None] * branch
        )

    def normed(
        self,
        values: Float[Array, "R2 K C"],
        scale: int,
        shift: int,
        dtype: DTypeLike,
        implementation: Implementation | None,
    ) -> tuple[Float[Array, "R T C"], Float[Array, "R T C"] | Eight]:
        """The settled stream, and its adaptive norm by rows `scale` and `shift` of `values`.

        dtype: of the norm; see `input_dtype`.
        """
        return pallas_kernels.residual_norm(
            self.x,
            self.branch,
            None if self.table is None else (self.table, self.index),
            (values, scale),
            (values, shift),
            bias=self.bias,
            dtype=dtype,
            implementation=implementation,
        )


def updated(x: Float[Array, "R T C"], update: Float[Array, "R T C"]) -> Float[Array, "R T C"]:
    """A residual stream with an update, added in float32 and rounded to the stream's dtype."""
    return rounded(x.astype(jnp.float32) + update, x.dtype).astype(x.dtype)
