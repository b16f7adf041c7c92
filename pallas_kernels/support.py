"""Where a call will run, and whether its operands belong together."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import jax
from jax.core import Tracer
from jaxtyping import Array

from pallas_kernels.sparsity import Gaps, visible_rows

# Of an H100: what persistent kernels are laid out for where nobody knows the device.
MULTIPROCESSORS = 132


@dataclass(frozen=True)
class Device:
    """What the choice of a kernel may depend on.

    platform: "cpu", "gpu" or another name of jax. kind: the device's full name.
    capability: CUDA's (major, minor); None elsewhere.
    """

    platform: str
    kind: str = ""
    capability: tuple[int, int] | None = None
    multiprocessors: int = MULTIPROCESSORS

    @property
    def is_cuda(self) -> bool:
        """Whether it runs CUDA programs."""
        return self.capability is not None

    @classmethod
    def of(cls, device: Any) -> Device:
        """A device of jax, or what has its attributes."""
        numbers = str(getattr(device, "compute_capability", "")).split(".")
        cuda = len(numbers) == 2 and all(number.isdigit() for number in numbers)
        return cls(
            device.platform,
            device.device_kind,
            (int(numbers[0]), int(numbers[1])) if cuda else None,
            int(getattr(device, "core_count", 0) or 0) or MULTIPROCESSORS,
        )


def device_of(*operands: Any) -> Device:
    """The device that a call on these operands will run on.

    The first operand that names one decides: an array that is committed to a device, a shape with
    a sharding, or a traced array whose sharding has a mesh. Else the mesh in use does, and else the
    default device. A traced array that is not spread over a mesh does not say where it lives: to
    trace for a device that is not the default one, set `jax.default_device`.
    """
    for leaf in jax.tree.leaves(operands):
        if (found := _named_by(leaf)) is not None:
            return found
    return _of_mesh(jax.sharding.get_abstract_mesh()) or Device.of(_default_device())


def _named_by(leaf: Any) -> Device | None:
    if isinstance(leaf, Tracer):
        return _of_mesh(getattr(jax.typeof(leaf).sharding, "mesh", None))
    if isinstance(leaf, jax.Array) and not leaf.committed:
        return None
    sharding = getattr(leaf, "sharding", None)
    if not isinstance(sharding, jax.sharding.Sharding):
        return None
    if isinstance(mesh := getattr(sharding, "mesh", None), jax.sharding.AbstractMesh):
        return _of_mesh(mesh)
    return Device.of(min(sharding.device_set, key=lambda device: device.id))


def _of_mesh(mesh: Any) -> Device | None:
    """Traced meshes know the kind of their devices, not which ones; all of a kind are alike."""
    abstract = getattr(mesh, "abstract_device", None)
    return None if abstract is None else _of_kind(abstract.platform, abstract.device_kind)


@functools.cache
def _of_kind(platform: str, kind: str) -> Device:
    try:
        alike = [device for device in jax.devices(platform) if device.device_kind == kind]
    except RuntimeError:  # a mesh described for devices of another machine
        alike = []
    return Device.of(alike[0]) if alike else Device(platform, kind)


def _default_device() -> jax.Device:
    chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
    if chosen is None or isinstance(chosen, str):
        return jax.local_devices(backend=chosen)[0]
    return chosen


def validate_operands(q: Array, k: Array, v: Array, kv_length: int, gaps: Gaps = ()) -> None:
    """Raise ValueError when q, k, v cannot belong together, or a gap lies outside the keys."""
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            "q must be [R', H, T, D] and k, v one shape [R, H, S, D]. "
            f"Got q {q.shape}, k {k.shape}, v {v.shape}."
        )
    if q.shape[0] > k.shape[0] or q.shape[1] != k.shape[1] or q.shape[3] != k.shape[3]:
        raise ValueError(
            "q may have fewer rows than the cache but needs its heads and head dim. "
            f"Got q {q.shape}, k {k.shape}."
        )
    if not 0 < kv_length <= k.shape[2]:
        raise ValueError(
            f"kv_length must lie in 1..{k.shape[2]}, the cache's rows. Got {kv_length}."
        )
    visible_rows(kv_length, kv_length, gaps)
