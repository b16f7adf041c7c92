"""Where a generation runs: one device, or a mesh of devices over rows and attention heads.

Steps run under `jax.shard_map`, so that kernels see the arrays of one device. Along the axis of
rows every device draws pictures of its own: with guidance it holds both rows of each, so that
mixing them crosses no device. Along the axis of guidance one device has the conditional rows and
the other the unconditional ones; all that crosses is what enters the head, once a scale. Along the
axis of heads every device holds the keys and values of its
own heads, and at scales where that pays (`split.py`) its own part of the tokens outside of
attention. Weights lie on every device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from sparvar_jax.models.bands import WHOLE, Bands
from sparvar_jax.models.family import ScaleModel
from sparvar_jax.plans.attend import HeadSplit
from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime import split
from sparvar_jax.runtime.state import ScaleOutput, State


@dataclasses.dataclass(frozen=True)
class Placement:
    """A mesh, and which of its axes divides rows and which heads; None leaves them whole.

    guidance: the axis of two devices that part conditional from unconditional rows, for plans whose
    rows are `apart`. divide_from: the tokens of a scale from which on they are divided along the
    axis of heads; None is where the cost model says that it pays.
    """

    mesh: Mesh
    rows: str | None = "rows"
    heads: str | None = "heads"
    divide_from: int | None = None
    guidance: str | None = None

    def __post_init__(self):
        for name in (self.rows, self.heads, self.guidance):
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
    def guidance_parts(self) -> int:
        """Over how many devices the rows of a picture are divided."""
        return self.mesh.shape[self.guidance] if self.guidance else 1

    @property
    def head_split(self) -> HeadSplit:
        """How a block finds its own heads."""
        if self.heads is None or self.mesh.shape[self.heads] == 1:
            return HeadSplit()
        return HeadSplit(self.heads, self.mesh.shape[self.heads])

    def divides(self, model: ScaleModel, tokens: int, rows: int) -> bool:
        """Whether the tokens of a scale are divided along the axis of heads.

        rows: of all devices, guidance included.
        """
        parts = self.head_split.parts
        if parts == 1:
            return False
        if self.divide_from is not None:
            return tokens >= self.divide_from
        mine = rows // (self.row_parts * self.guidance_parts)
        return split.pays(split.Layer.of(model), tokens * mine, parts)

    def check(self, batch: int, heads: int) -> None:
        """Raise ValueError unless so many pictures and heads can be divided."""
        parts = self.by_pictures(batch).head_split.parts
        split.check(heads, parts)

    def place(self, batch: int, heads: int, plan: Plan | None = None) -> Placement:
        """This placement, if pictures, heads and a plan's rows can be divided; else ValueError."""
        self.check(batch, heads)
        if self.guidance is not None and plan is not None and not plan.apart:
            raise ValueError(
                f"conditional and unconditional rows of the plan {plan.name!r} meet before the "
                "head, or some run alone: name no axis of guidance"
            )
        return self

    def by_pictures(self, batch: int) -> Placement:
        """This placement, if so many pictures can be divided; ValueError otherwise."""
        if batch % self.row_parts:
            raise ValueError(
                f"{batch} pictures cannot be divided over {self.row_parts} devices: draw a "
                f"multiple of {self.row_parts}"
            )
        return self

    def bands(self, height: int) -> Bands:
        """How maps so high are cut into bands over the axis of heads: not if they do not divide."""
        split = self.head_split
        return WHOLE if height % split.parts else Bands(split.axis, split.parts)

    def divide(self, function: Callable[..., Any], bands: Bands = WHOLE) -> Callable[..., Any]:
        """`function(weights, *rows)` on every device of the mesh, on that device's rows.

        bands: where a result's second axis is cut into bands.
        """
        divided = jax.shard_map(
            lambda weights, rows: function(weights, *rows),
            mesh=self.mesh,
            in_specs=(PartitionSpec(), self._rows),
            out_specs=PartitionSpec(self.rows, bands.axis) if bands.axis else self._rows,
            check_vma=False,
        )

        def call(weights: Any, *rows: Any) -> Any:
            return divided(weights, rows)

        call.__name__ = function.__name__
        return call

    def wrap(self, body: Callable[..., Any]) -> Callable[..., Any]:
        """`draw_scale` on every device of the mesh, on that device's rows and heads."""
        whole, rows, kept = PartitionSpec(), self._rows, self._cache
        return jax.shard_map(
            body,
            mesh=self.mesh,
            in_specs=(whole, self._guided, (kept, kept, rows), (kept, rows), whole, rows, rows),
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

    def conditions(self, tree: Any) -> Any:
        """Shapes of what tells a model what to draw, as they lie on the mesh."""
        return _shaped(tree, NamedSharding(self.mesh, self._guided))

    def state(self, state: State) -> State:
        """Shapes of a state, as it lies on the mesh."""
        cache = NamedSharding(self.mesh, self._cache)
        kept, shared, left = _shaped((state.cache, state.shared, state.strategies), cache)
        return State(kept, shared, left, self.by_rows(state.code_sum), self.by_rows(state.codes))

    @property
    def whole(self) -> NamedSharding:
        """Where arrays lie that every device has whole."""
        return NamedSharding(self.mesh, PartitionSpec())

    def put_parameters(self, parameters: Any) -> Any:
        """Weights on every device of the mesh; those that are there already stay."""
        return put(parameters, self.whole)

    def put_rows(self, tree: Any, groups: int = 1) -> Any:
        """Arrays whose rows are `groups` runs of pictures, such that a device holds its pictures.

        Of [conditional | unconditional] rows each device gets both of every picture it draws. What
        is divided over these devices already was made so: it stays as it is.
        """
        pictures = NamedSharding(self.mesh, self._rows)
        sharding = pictures if groups == 1 else NamedSharding(self.mesh, self._guided)
        if self.row_parts == 1 or _lies(tree, pictures) or _lies(tree, sharding):
            return put(tree, sharding)
        return put(tree if groups == 1 else _swapped(tree, (groups, self.row_parts)), sharding)

    def ordered(self, output: ScaleOutput, batch: int) -> ScaleOutput:
        """The output with captured and reported rows as one device has them: `put_rows` undone.

        batch: pictures. Arrays of at most so many rows are in order already.
        """

        mixed, treedef = jax.tree.flatten((output.captured, output.reports))
        if self.row_parts == 1 or not mixed:
            return output
        ordered = [
            _swapped(x, (self.row_parts, len(x) // batch)) if len(x) > batch else x for x in mixed
        ]
        return ScaleOutput(output.tokens, *jax.tree.unflatten(treedef, ordered))

    @property
    def _rows(self) -> PartitionSpec:
        return PartitionSpec(self.rows)

    @property
    def _guided(self) -> PartitionSpec:
        """Of arrays that have conditional and unconditional rows."""
        return PartitionSpec(self._all_rows)

    @property
    def _cache(self) -> PartitionSpec:
        return PartitionSpec(self._all_rows, self.head_split.axis)

    @property
    def _all_rows(self) -> Any:
        if self.guidance is None:
            return self.rows
        return (self.rows, self.guidance) if self.rows else self.guidance


@functools.partial(jax.jit, static_argnames="parts")
def _swapped(tree: Any, parts: tuple[int, int]) -> Any:
    """Arrays whose rows are `parts[0]` x `parts[1]` runs, as `parts[1]` x `parts[0]` ones."""

    def swap(x: jax.Array) -> jax.Array:
        return x.reshape(*parts, -1, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)

    return jax.tree.map(swap, tree)


def put(tree: Any, sharding: NamedSharding) -> Any:
    """Arrays where they are asked for; those that lie so already stay, whatever the mesh's name."""
    placed, treedef = jax.tree.flatten(tree)
    here: list[int] = []
    elsewhere: list[int] = []
    for n, x in enumerate(placed):
        if not _lies(x, sharding):
            on_mesh = isinstance(x, jax.Array) and _same_devices(x.sharding, sharding)
            (here if on_mesh else elsewhere).append(n)
    moves = (here, _relaid(sharding)), (elsewhere, lambda arrays: jax.device_put(arrays, sharding))
    for numbers, move in moves:
        moved = move([placed[n] for n in numbers]) if numbers else ()
        for n, array in zip(numbers, moved, strict=True):
            placed[n] = array
    return jax.tree.unflatten(treedef, placed)


@functools.lru_cache(maxsize=16)
def _relaid(sharding: NamedSharding) -> Callable[[list[jax.Array]], list[jax.Array]]:
    """One program that lays arrays out anew: one by one, jax takes each through the host."""
    return jax.jit(lambda arrays: arrays, out_shardings=sharding)


@functools.lru_cache(maxsize=16)
def _same_devices(ours: Sharding, theirs: NamedSharding) -> bool:
    """Whether arrays lie on the devices of a mesh already, in the mesh's order."""
    if not isinstance(ours, NamedSharding):
        return False
    one, other = (np.asarray(sharding.mesh.devices) for sharding in (ours, theirs))
    return one.ravel().tolist() == other.ravel().tolist()


def _lies(tree: Any, sharding: NamedSharding) -> bool:
    """Whether all arrays of a tree lie so."""

    return all(
        isinstance(x, jax.Array) and _equivalent(x.sharding, sharding, x.ndim)
        for x in jax.tree.leaves(tree)
    )


@functools.lru_cache(maxsize=256)
def _equivalent(ours: Sharding, theirs: NamedSharding, axes: int) -> bool:
    """Whether arrays of so many axes lie alike."""
    return ours == theirs or ours.is_equivalent_to(theirs, axes)


def _shaped(tree: Any, sharding: NamedSharding) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def mesh_of(rows: int, heads: int, devices: Any = None, guidance: int = 1) -> Mesh:
    """A mesh of `rows` x `heads` devices with the axes "rows" and "heads".

    guidance: 2 puts the axis "guidance" of two devices between them. Raises ValueError where there
    are fewer devices.
    """
    devices = jax.devices() if devices is None else devices
    axes = {"rows": rows, "guidance": guidance, "heads": heads}
    if guidance == 1:
        del axes["guidance"]
    shape, wanted = tuple(axes.values()), rows * guidance * heads
    if wanted > len(devices):
        raise ValueError(
            f"a mesh of {'x'.join(map(str, shape))} needs {wanted} devices, got {len(devices)}"
        )
    return Mesh(np.asarray(devices[:wanted]).reshape(shape), tuple(axes))
