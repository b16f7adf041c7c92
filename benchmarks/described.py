"""A GPU of which XLA is told, so that programs are compiled for it where it is not."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from benchmarks.gpus import Gpu
from pallas_kernels import support


class Described:
    """Chooses kernels, for the rest of this process, as they are chosen on the real device."""

    def __init__(self, gpu: Gpu):
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(
            "described", "cuda", target_config=gpu.target(), topology="1x1x1"
        )
        self.mesh = jax.sharding.Mesh(np.array(topology.devices), ("x",))
        self._where = jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec())
        device = support.Device("gpu", gpu.kind, gpu.capability, gpu.multiprocessors)
        support.device_of = lambda *operands: device

    def put(self, tree: Any) -> Any:
        """Shapes that lie on the device."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=self._where), tree
        )
