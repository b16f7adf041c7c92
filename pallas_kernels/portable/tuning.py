"""Tiles and launch parameters of the Triton kernels: by family of GPUs, and measured in a JSON.

A family is a compute capability, "8.0" say; one that nobody has measured gets the heuristic.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Capability = tuple[int, int] | None
# Opt-in shared memory of a block in KiB; others have at least the smallest.
_SHARED = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
_LEAST_SHARED = 99


@dataclass(frozen=True, kw_only=True)
class Launch:
    """warps: warps a program; stages: tiles of a loop in flight."""

    warps: int = 4
    stages: int = 2


@dataclass(frozen=True, kw_only=True)
class TileConfig(Launch):
    """block_q: queries a program; block_k: keys a step."""

    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        for name in ("block_q", "block_k", "warps"):
            size = getattr(self, name)
            if size < 1 or size & (size - 1):
                raise ValueError(f"{name} must be a power of two. Got {size}.")


@dataclass(frozen=True, kw_only=True)
class ProductTiles(Launch):
    """rows, outputs: of a program; step: inputs at once."""

    rows: int
    outputs: int
    step: int


@functools.cache
def measured(family: str) -> dict[str, dict[str, Any]]:
    """What the JSON says of a family, by `key`; another entry counts from the next trace on."""
    table = json.loads(Path(__file__).with_name("tuning.json").read_text())
    return table.get(family, {})


def family(capability: Capability) -> str:
    """The name of a family in the JSON."""
    return "" if capability is None else f"{capability[0]}.{capability[1]}"


def stages_that_fit(capability: Capability, head_dim: int, block_q: int, block_k: int) -> int:
    """At most three tiles of keys and values beside the queries in shared memory."""
    room = _SHARED.get(capability or (0, 0), _LEAST_SHARED) * 1024
    row = 2 * head_dim
    return max(1, min(3, (room - block_q * row) // (2 * block_k * row)))


def key(op: str, head_dim: int, bounded: bool, group: int) -> str:
    """The name of a call's tiles in the JSON."""
    return f"{op}/{head_dim}/{'bounded' if bounded else 'online'}/{group}"


def tiles(
    op: str, head_dim: int, bounded: bool, group: int, capability: Capability = None
) -> TileConfig:
    """Tiles of "dense", "blocks", "windows", "windows-exact" or "columns".

    `group` queries share a list.
    """
    tuned = measured(family(capability)).get(key(op, head_dim, bounded, group))
    if tuned is not None:
        return TileConfig(**tuned)
    # Lists and masks take registers: with 64 keys of 128 channels a step some would be spilled.
    narrow = head_dim > 64 and op in ("columns", "windows-exact")
    block_q, block_k = min(group & -group, 128), 32 if narrow else 64
    stages = stages_that_fit(capability, head_dim, block_q, block_k)
    return TileConfig(block_q=block_q, block_k=block_k, warps=4 if block_q < 128 else 8,
                      stages=stages)  # fmt: skip


def column_sums(head_dim: int, capability: Capability = None) -> TileConfig:
    """Tiles of the column-sum pass: `block_q` queries a step, `block_k` keys a program."""
    tuned = measured(family(capability)).get(f"column_sums/{head_dim}", {})
    return TileConfig(**(dict(block_q=64, block_k=128, warps=4, stages=3) | tuned))


def products(rows: int, capability: Capability = None) -> ProductTiles:
    """Tiles of products of so many rows with 8-bit weights."""
    most = next((size for size in (16, 32, 64, 128) if rows <= size), 256)
    wide = dict(rows=min(most, 128), outputs=64, step=64 if most > 64 else 128, warps=4, stages=4)
    return ProductTiles(**(wide | measured(family(capability)).get(f"weights/{most}", {})))


def dividing(config: TileConfig, block_q: int, block_k: int) -> TileConfig:
    """Tiles that divide blocks of a table."""
    largest = [size & -size for size in (block_q, block_k)]
    return dataclasses.replace(
        config,
        block_q=min(config.block_q, largest[0]),
        block_k=min(config.block_k, largest[1]),
    )
