"""Where a generation runs: one device, or a mesh of devices over rows and attention heads.

Steps run under `jax.shard_map`, so that kernels see the arrays of one device. Along the axis of
rows every device draws pictures of its own: with guidance it holds both rows of each, so that
mixing them crosses no device. Along the axis of heads every device holds the keys and values of its
own heads. Weights lie on every device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sparvar_jax.plans.attend import HeadSplit
from sparvar_jax.runtime.step import ScaleOutput, State


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and which of its axes divides rows and which heads; None leaves them whole."""

    mesh: Mesh
    rows: str | None = "rows"
    heads: str | None = "heads"

    def __post_init__(self):
        for name in (self.rows, self.heads):
            if name is not None and name not in self.mesh.shape:
                raise ValueError(
                    f"the mesh has the axes {tuple(self.mesh.shape)}, got {name!r}: name one of "
                    "them, or None"
                )

    @property
    def row_parts(self) -> int:
        """Over how many devices pictures are divided."""
        return self.mesh.shape[self.rows] if self.rows else 1

    @property
    def head_split(self) -> HeadSplit:
        """How a block finds its own heads."""
        if self.heads is None or self.mesh.shape[self.heads] == 1:
            return HeadSplit()
        return HeadSplit(self.heads, self.mesh.shape[self.heads])

    def check(self, batch: int, heads: int) -> None:
        """Raise ValueError unless so many pictures and heads can be divided."""
        parts = self.head_split.parts
        if batch % self.row_parts:
            raise ValueError(
                f"{batch} pictures cannot be divided over {self.row_parts} devices: draw a "
                f"multiple of {self.row_parts}"
            )
        if heads % parts:
            possible = [count for count in range(1, heads + 1) if heads % count == 0]
            raise ValueError(
                f"{heads} attention heads cannot be divided over {parts} devices: give one of "
                f"{', '.join(map(str, possible))}"
            )

    def wrap(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """`draw_scale` on every device of the mesh, on that device's rows and heads."""
        whole, rows, kept = PartitionSpec(), self._rows, self._cache
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(whole, rows, (kept, kept, rows), (kept, rows), whole, rows, rows),
            out_specs=(
                State(kept, kept, kept, rows, rows),  # type: ignore[arg-type]
                ScaleOutput(rows, rows, kept),  # type: ignore[arg-type]
            ),
            check_vma=False,
        )

    def parameters(self, tree: Any) -> Any:
        """Shapes of weights, as they lie on the mesh: whole on every device."""
        return _shaped(tree, NamedSharding(self.mesh, PartitionSpec()))

    def by_rows(self, tree: Any) -> Any:
        """Shapes of arrays whose rows are divided, as they lie on the mesh."""
        return _shaped(tree, NamedSharding(self.mesh, self._rows))

    def state(self, state: State) -> State:
        """Shapes of a state, as it lies on the mesh."""
        cache = NamedSharding(self.mesh, self._cache)
        kept, shared, left = _shaped((state.cache, state.shared, state.strategies), cache)
        return State(kept, shared, left, self.by_rows(state.code_sum), self.by_rows(state.codes))

    def put_parameters(self, parameters: Any) -> Any:
        """Weights on every device of the mesh; those that are there already stay."""
        return jax.device_put(parameters, NamedSharding(self.mesh, PartitionSpec()))

    def put_rows(self, tree: Any, groups: int = 1) -> Any:
        """Arrays whose rows are `groups` runs of pictures, such that a device holds its pictures.

        Of [conditional | unconditional] rows each device gets both of every picture it draws.
        """
        sharding = NamedSharding(self.mesh, self._rows)

        def put(x: Any) -> jax.Array:
            parted = x.reshape(groups, self.row_parts, -1, *x.shape[1:])
            return jax.device_put(parted.swapaxes(0, 1).reshape(x.shape), sharding)

        return jax.tree.map(put, tree)

    def ordered(self, output: ScaleOutput, batch: int) -> ScaleOutput:
        """The output with captured and reported rows as one device has them: `put_rows` undone.

        batch: pictures. Arrays of at most so many rows are in order already.
        """

        def back(x: jax.Array) -> jax.Array:
            if len(x) <= batch:
                return x
            parted = x.reshape(self.row_parts, len(x) // batch, -1, *x.shape[1:])
            return parted.swapaxes(0, 1).reshape(x.shape)

        captured, reports = jax.tree.map(back, (output.captured, output.reports))
        return ScaleOutput(output.tokens, captured, reports)

    @property
    def _rows(self) -> PartitionSpec:
        return PartitionSpec(self.rows)

    @property
    def _cache(self) -> PartitionSpec:
        split = self.head_split
        return PartitionSpec(self.rows, split.axis)


class PlacedWeights:
    """Weights on every device of a mesh, copied again where they changed and nowhere else."""

    def __init__(self, placement: Placement):
        self._placement = placement
        self._given: list[Any] = []
        self._placed: list[Any] = []

    def of(self, parameters: Sequence[Any]) -> list[Any]:
        """The weights on the mesh; those given before are there already."""
        if len(parameters) != len(self._given):
            self._given, self._placed = [None] * len(parameters), [None] * len(parameters)
        new = [n for n, leaf in enumerate(parameters) if leaf is not self._given[n]]
        copies = self._placement.put_parameters([parameters[n] for n in new])
        for n, copy in zip(new, copies, strict=True):
            self._given[n], self._placed[n] = parameters[n], copy
        return list(self._placed)


def _shaped(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def mesh_of(rows: int, heads: int, devices: Any = None) -> Mesh:
    """A mesh of `rows` x `heads` devices with the axes "rows" and "heads".

    Raises ValueError where there are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    if rows * heads > len(devices):
        raise ValueError(
            f"a mesh of {rows}x{heads} needs {rows * heads} devices, got {len(devices)}"
        )
    return Mesh(np.asarray(devices[: rows * heads]).reshape(rows, heads), ("rows", "heads"))
