"""Devices that draw together, and weights that lie on all of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from sparvar_jax.plans.plan import Plan
from sparvar_jax.runtime import split
from sparvar_jax.runtime.placement import Placement, mesh_of, put
from sparvar_jax.weights.told import told

Asked = int | str | Sequence[jax.Device] | None
"""How a user names devices: see `devices_of`."""


@dataclasses.dataclass(frozen=True)
class Devices:
    """Devices whose mesh is chosen for every generation, see `split.shape`.

    divide_from: as of `Placement`. part_guidance: whether conditional and unconditional rows go to
    different devices where a plan allows.
    """

    devices: tuple[jax.Device, ...]
    divide_from: int | None = None
    part_guidance: bool = True

    def place(self, batch: int, heads: int, plan: Plan | None = None) -> Placement:
        """The mesh for so many pictures, drawn by a plan.

        Raises ValueError where heads cannot be divided.
        """
        asked = plan if self.part_guidance else None
        rows, guidance, left = split.shape(len(self.devices), batch, heads, asked)
        if guidance == 1:
            return self.by_pictures(batch)
        mesh = mesh_of(rows, left, self.devices, guidance)
        return Placement(mesh, divide_from=self.divide_from, guidance="guidance")

    def by_pictures(self, batch: int) -> Placement:
        """The mesh for so many pictures."""
        rows = math.gcd(batch, len(self.devices))
        mesh = mesh_of(rows, len(self.devices) // rows, self.devices)
        return Placement(mesh, divide_from=self.divide_from)

    @property
    def whole(self) -> NamedSharding:
        """Where arrays lie that every device has whole."""
        return NamedSharding(mesh_of(1, len(self.devices), self.devices), PartitionSpec())

    def put_parameters(self, parameters: Any) -> Any:
        """Weights on every device; those that are there already stay."""
        return put(parameters, self.whole)


class PlacedWeights:
    """Weights on every device of a mesh, copied again where they changed and nowhere else."""

    def __init__(self, placement: Placement | Devices):
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


def devices_of(asked: Asked, heads: int) -> Devices | None:
    """The devices that a user asks for; None is the default device alone.

    asked: a number, "auto" for as many of this process's devices as the heads can be divided over,
    or devices. Raises ValueError for more than there are.
    """
    here = jax.local_devices()
    if asked is None or isinstance(asked, int | str):
        here = here[: count_of(asked, len(here), heads)]
    else:
        here = list(asked)
        if not here:
            raise ValueError("devices must be at least one, got none")
    return Devices(tuple(here)) if len(here) > 1 else None


def count_of(asked: int | str | None, found: int, heads: int) -> int:
    """How many of `found` devices are asked for; see `devices_of`."""
    possible = [count for count in range(1, found + 1) if heads % count == 0]
    if asked is None:
        return 1
    if asked == "auto":
        return possible[-1]
    if isinstance(asked, str) and not (asked.isascii() and asked.isdigit() and len(asked) < 10):
        raise ValueError(f"devices must be a number or 'auto', got {told(asked, 40)!r}")
    count = int(asked)
    if not 1 <= count <= found:
        raise ValueError(f"devices must lie in 1..{found}, the devices there are, got {count}")
    return count
