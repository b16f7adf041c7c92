"""Data parallelism over all accelerators of one host; with one of them it is plain compilation."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

AXIS = "data"
WHOLE = PartitionSpec()
SPLIT = PartitionSpec(AXIS)


def make_mesh() -> Mesh:
    """One axis over every local device."""
    auto = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((jax.local_device_count(),), (AXIS,), axis_types=auto)


def spread(function: Callable, mesh: Mesh, inputs: tuple, outputs: Any, donate: int = 0) -> Any:
    """Compile `function` to run on each device's share of the arguments marked SPLIT."""
    mapped = jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)
    return jax.jit(mapped, donate_argnums=donate)


def put(tree: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> Any:
    """Arrays on the devices, copied to each or split along their first axis."""
    return jax.device_put(tree, NamedSharding(mesh, spec))


def abstract(tree: Any, mesh: Mesh, spec: PartitionSpec = WHOLE) -> Any:
    """Shapes with the placement that `put` would give."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree
    )


def device_key(seed: Any) -> jax.Array:
    """A random key of this step on this device (inside `spread`)."""
    return jax.random.fold_in(jax.random.key(seed), jax.lax.axis_index(AXIS))


def mean(tree: Any) -> Any:
    """The mean over devices (inside `spread`)."""
    return jax.lax.pmean(tree, AXIS)
