"""Reading kept executables: of what jax pickles, only its own descriptions of a program are made.

jax serialises an executable by pickling XLA's bytes together with avals, shardings and layouts. A
plain unpickler would call whatever function a file names; this one makes the classes listed here
and nothing else. The file still holds machine code, so it is read from private folders alone.
"""

from __future__ import annotations

import io
import pickle
from typing import Any

import jax
from jax.experimental import serialize_executable

ALLOWED = frozenset(
    {
        ("jax", "P"),
        ("jax._src.core", "ManualAxisType"),
        ("jax._src.core", "MemorySpace"),
        ("jax._src.core", "ShapedArray"),
        ("jax._src.interpreters.pxla", "AllArgsInfo"),
        ("jax._src.interpreters.pxla", "UnloadedMeshExecutable"),
        ("jax._src.layout", "AutoLayoutSingleton"),
        ("jax._src.layout", "Layout"),
        ("jax._src.linear_util", "DebugInfo"),
        ("jax._src.mesh", "AbstractMesh"),
        ("jax._src.mesh", "AxisType"),
        ("jax._src.mesh", "Mesh"),
        ("jax._src.named_sharding", "_unpickle_named_sharding"),
        ("jax._src.partition_spec", "PartitionSpec"),
        ("jax._src.random.prng", "KeyTy"),
        ("jax._src.random.prng", "PRNGImpl"),
        ("jax._src.random.threefry2x32", "threefry_fold_in"),
        ("jax._src.random.threefry2x32", "threefry_random_bits"),
        ("jax._src.random.threefry2x32", "threefry_seed"),
        ("jax._src.random.threefry2x32", "threefry_split"),
        ("jax._src.sharding_impls", "_unpickle_gspmd_sharding"),
        ("jax._src.sharding_impls", "_unpickle_named_sharding"),
        ("jax._src.sharding_impls", "_unpickle_single_device_sharding"),
        ("jax._src.stages", "ArgInfo"),
        ("jaxlib._jax", "DeviceList"),
        ("numpy", "dtype"),
        ("numpy._core.multiarray", "_reconstruct"),
    }
)
"""Module and name of what a kept executable of jax 0.10 to 0.12 is made of."""


class Refused(ValueError):
    """A file names something that no executable is made of."""


class _Unpickler(serialize_executable._JaxPjrtUnpickler):  # type: ignore[name-defined]
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise Refused(f"a kept program names {module}.{name}")
        return super().find_class(module, name)


def unpack(payload: bytes, traced: jax.stages.Traced) -> Any:
    """The executable in what `serialize_executable.serialize` gave, for the default device.

    Raises Refused for anything else in it, and whatever jax raises for what it cannot load.
    """
    device = jax.local_devices()[0]
    reader = _Unpickler(io.BytesIO(payload), device.client, [device])
    try:
        unloaded, args_info, no_kwargs = reader.load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError) as error:
        raise Refused(str(error)) from error
    return jax.stages.Compiled(
        unloaded.load(),
        [],
        traced.in_tree.unflatten(args_info),
        traced.out_tree,
        no_kwargs=no_kwargs,
    )
