"""Processes that share one job: who this one is, which part is its own, and waiting for the rest.

Every process draws on its own devices; what they share is a folder.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import jax

from sparvar_jax.weights.told import told


@dataclasses.dataclass(frozen=True)
class Host:
    """One of `count` processes of a job; by default the only one."""

    index: int = 0
    count: int = 1

    def mine(self, places: Iterable[int]) -> list[int]:
        """This process's share of numbered pieces of work: the same in every run."""
        return [place for place in places if place % self.count == self.index]

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once."""
        return self.index == 0

    def wait(self, name: str) -> None:
        """Wait until all processes are here; name: of the place, the same in all of them."""
        if self.count > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(name)


def join(coordinator: str | None, processes: int | None = None, process: int | None = None) -> Host:
    """Join the processes of a job, before anything else touches a device; None is one process.

    coordinator: HOST:PORT of the first process, with how many there are and which this one is; or
    "auto" in a cluster that jax knows (Slurm, Open MPI, Kubernetes, cloud TPUs). Waits for all of
    them. Raises ValueError for numbers that make no sense.
    """
    if coordinator is None:
        if processes is not None or process is not None:
            raise ValueError("processes work together through a coordinator: give HOST:PORT, too")
        return Host()
    if coordinator == "auto":
        jax.distributed.initialize()
    else:
        name, _, port = coordinator.rpartition(":")
        if not (name and port.isascii() and port.isdigit() and 0 < int(port[:6]) < 1 << 16):
            raise ValueError(
                f"the coordinator must be 'auto' or HOST:PORT, got {told(coordinator, 80)!r}"
            )
        if processes is None or process is None or not 0 <= process < processes:
            raise ValueError(
                "with a coordinator say how many processes there are, and which of them this is, "
                f"from 0: got {processes} and {process}"
            )
        jax.distributed.initialize(coordinator, processes, process)
    return Host(jax.process_index(), jax.process_count())
