"""From which scale on it pays to divide tokens over devices: a cost model, stated and small.

Every device holds all weights, so a scale of few tokens takes as long as reading them, divided or
not. What dividing costs is two exchanges a layer: queries, keys and values to the devices of their
heads, and outputs back.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Machine:
    """What a device and the links between devices do; measured on H100s of one host.

    rate: operations a second of the products and all that goes with them. memory, link: bytes a
    second, the link's in each direction. latency: seconds of an exchange that carries nothing.
    """

    rate: float = 5.5e14
    memory: float = 2.6e12
    link: float = 2.5e11
    latency: float = 2.5e-5


@dataclasses.dataclass(frozen=True)
class Layer:
    """The size of a transformer layer: its weights, and the width of its stream.

    weights: parameters of its matrices. item: bytes of one number.
    """

    weights: int
    width: int
    item: int

    @classmethod
    def of(cls, model: Any) -> Layer:
        """The layers of a model, which may be abstract."""
        config = model.config
        matrices = (leaf for leaf in jax.tree.leaves(model.blocks[0]) if leaf.ndim > 1)
        width = config.heads * config.head_dim
        return cls(sum(leaf.size for leaf in matrices), width, config.precision.compute.itemsize)

    def seconds(self, tokens: float, machine: Machine) -> float:
        """What so many tokens take on one device, attention left out: it is divided anyway."""
        reading = self.weights * self.item / machine.memory
        return max(reading, 2 * self.weights * tokens / machine.rate)

    def exchange_seconds(self, tokens: float, parts: int, machine: Machine) -> float:
        """What both exchanges take. A device sends what belongs to others: (parts - 1) / parts."""
        sent = 4 * self.width * self.item * (tokens / parts) * (parts - 1) / parts
        return 2 * machine.latency + sent / machine.link


def pays(layer: Layer, tokens: int, parts: int, machine: Machine = Machine()) -> bool:
    """Whether dividing the tokens of a scale, all rows of a device counted, is faster."""
    whole = layer.seconds(tokens, machine)
    divided = layer.seconds(tokens / parts, machine)
    return divided + layer.exchange_seconds(tokens, parts, machine) < whole
