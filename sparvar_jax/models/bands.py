"""Maps cut into bands of rows over the devices of a mesh axis, with the rows that borders need."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped


@dataclasses.dataclass(frozen=True)
class Bands:
    """How rows of maps lie over devices; by default all on one.

    Inside `jax.shard_map` device p of an axis holds the p-th of `parts` equal runs of rows.
    """

    axis: str | None = None
    parts: int = 1

    def own(self, x: Shaped[Array, "B height width C"]) -> Shaped[Array, "B rows width C"]:
        """This device's rows of a map that all devices hold whole."""
        if self.axis is None:
            return x
        rows = x.shape[1] // self.parts
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(self.axis) * rows, rows, axis=1)

    def with_neighbours(
        self, x: Float[Array, "B height width C"], padding: tuple[int, int]
    ) -> tuple[Float[Array, "B rows width C"], tuple[int, int]]:
        """The band with as many rows above and below it, and the padding of rows that is left.

        The first band gets zeros above it and the last zeros below: what padding a map gives.
        """
        if self.axis is None or padding == (0, 0):
            return x, padding
        above, below = padding
        down = [(p, p + 1) for p in range(self.parts - 1)]
        parts = [x]
        if above:
            parts.insert(0, jax.lax.ppermute(x[:, -above:], self.axis, down))
        if below:
            up = [(target, source) for source, target in down]
            parts.append(jax.lax.ppermute(x[:, :below], self.axis, up))
        return jnp.concatenate(parts, axis=1), (0, 0)

    def middle(self, x: Float[Array, "B height width C"]) -> int:
        """The row of a band, on the device that `shared` reads, near the middle of the map."""
        return x.shape[1] // 2 if self.parts % 2 else 0

    def shared(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The value of the middle device, on all of them."""
        if self.axis is None:
            return x
        mine = jax.lax.axis_index(self.axis) == self.parts // 2
        return jax.lax.psum(jnp.where(mine, x, 0), self.axis)

    def mean(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """The mean over all bands, which are of equal size."""
        return x if self.axis is None else jax.lax.pmean(x, self.axis)


WHOLE = Bands()
"""All rows on one device."""
