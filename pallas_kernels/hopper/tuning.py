"""Tuning configurations of the kernels: a heuristic, and values measured on a device in a JSON.

`kind` is the name of a device; one that nobody has measured gets the heuristic.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class BlockListConfig:
    """Tiles of the block-list kernel.

    consumers: warpgroups of 64 queries; block_k: keys a stage; stages: buffers of keys and values;
    turns: whether warpgroups take turns on the tensor cores; scores_first: whether the next scores
    are issued before the previous output product; query_buffers: 1 or 2 query tiles in flight.
    """

    consumers: int = 2
    block_k: int = 128
    stages: int = 2
    turns: bool = True
    scores_first: bool = True
    query_buffers: int = 2

    def __post_init__(self) -> None:
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"consumers must be 1, 2 or 3. Got {self.consumers}.")
        if self.block_k % 16 or not 16 <= self.block_k <= 256:
            raise ValueError(f"block_k must be a multiple of 16 up to 256. Got {self.block_k}.")
        if self.stages < 2:
            raise ValueError(f"stages must be at least 2. Got {self.stages}.")

    @property
    def block_q(self) -> int:
        """Queries a work item."""
        return 64 * self.consumers

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread may use; a CTA has 65536."""
        return {1: 240, 2: 240, 3: 160}[self.consumers]

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread may use."""
        return {1: 40, 2: 24, 3: 32}[self.consumers]


@dataclass(frozen=True, kw_only=True)
class GatherConfig:
    """Tiles of the gather kernel; the names are those of `BlockListConfig`.

    lag: stages whose copies are in flight before the oldest is waited for.
    """

    consumers: int = 3
    block_k: int = 64
    stages: int = 4
    lag: int = 2
    turns: bool = True
    scores_first: bool = True
    query_buffers: int = 2

    def __post_init__(self) -> None:
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"consumers must be 1, 2 or 3. Got {self.consumers}.")
        if self.block_k not in (64, 128):
            raise ValueError(f"block_k must be 64 or 128. Got {self.block_k}.")
        if not 1 <= self.lag < self.stages:
            raise ValueError(f"lag must lie in 1..stages - 1. Got {self.lag} of {self.stages}.")
        if self.query_buffers < 2:
            raise ValueError(f"query_buffers must be at least 2. Got {self.query_buffers}.")

    @property
    def least_stages(self) -> int:
        """Stages that an item is made to have, if need be with hidden keys alone.

        A stage is announced `lag` stages later, by then in a later item, whose queries must find a
        buffer before the consumers have finished this item: fewer stages would be a deadlock.
        """
        return -(-self.lag // (self.query_buffers - 1))

    @property
    def block_q(self) -> int:
        """Queries a work item."""
        return 64 * self.consumers

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread may use; a CTA has 65536."""
        return {1: 240, 2: 208, 3: 152}[self.consumers]

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread may use: row numbers are held a stage ahead."""
        return {1: 88, 2: 88, 3: 56}[self.consumers]


@dataclass(frozen=True, kw_only=True)
class ColumnSumsConfig:
    """consumers: warpgroups of 64 keys; stages: buffers of query groups."""

    consumers: int = 3
    stages: int = 2

    def __post_init__(self) -> None:
        if self.consumers not in (1, 2, 3):
            raise ValueError(f"consumers must be 1, 2 or 3. Got {self.consumers}.")

    @property
    def block_k(self) -> int:
        """Keys a work item."""
        return 64 * self.consumers

    @property
    def consumer_registers(self) -> int:
        """Registers a consumer thread may use; a CTA has 65536."""
        return {1: 240, 2: 240, 3: 160}[self.consumers]

    @property
    def producer_registers(self) -> int:
        """Registers a producer thread may use."""
        return {1: 40, 2: 24, 3: 32}[self.consumers]


@functools.cache
def _tuned(kind: str) -> dict[str, dict[str, Any]]:
    """Measured entries of a device; empty for one that nobody has measured."""
    table = json.loads(Path(__file__).with_name("tuning.json").read_text())
    return table.get(kind, {})


def _key(op: str, head_dim: int, bounded: bool) -> str:
    return f"{op}/{head_dim}/{'bounded' if bounded else 'online'}"


def block_list_config(
    op: str, head_dim: int, bounded: bool, block_k: int = 128, kind: str = ""
) -> BlockListConfig:
    """Tiles for `op` ("dense" or "blocks"). Without tuned values: as many stages as fit.

    Long lists without rescaling keep the tensor cores busy without taking turns.
    """
    tuned = _tuned(kind).get(f"{_key(op, head_dim, bounded)}/{block_k}")
    if tuned is not None:
        return BlockListConfig(**tuned)
    stages = 2 * (128 // head_dim) * (128 // block_k)
    turns = not (bounded and op == "dense")
    return BlockListConfig(block_k=block_k, stages=stages, turns=turns)


def gather_config(
    op: str, head_dim: int, bounded: bool, group: int = 128, kind: str = ""
) -> GatherConfig:
    """Tiles for "windows" or "columns"; `group` queries share a list."""
    tuned = _tuned(kind).get(f"{_key(op, head_dim, bounded)}/{group}")
    if tuned is not None:
        return GatherConfig(**tuned)
    stages = {64: 5, 128: 5, 192: 4}[group] + (2 if head_dim == 64 else 0)
    return GatherConfig(consumers=group // 64, stages=stages, lag=2)


def column_sums_config(head_dim: int, kind: str = "") -> ColumnSumsConfig:
    """Tiles of the column-sum pass."""
    return ColumnSumsConfig(**_tuned(kind).get(f"column_sums/{head_dim}", {}))
