"""Orders of (layer, head) pairs by how much they attend to an earlier scale, least first.

HeatKV (arXiv 2605.14877) published such orders for two models; `study.head_order` makes one for
any. What a budget removes follows from an order by counting alone.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool

from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.weights.files import whole_file
from sparvar_jax.weights.json_file import read_json

FOLDER = Path(__file__).parent / "orders"
FORMAT = 1
MOST = 1024
"""Most layers, and most heads of a layer."""


@dataclasses.dataclass(frozen=True)
class HeadOrders:
    """For every source scale from `sinks` on: pairs `layer * heads + head`, least attending first.

    Scales before `sinks` are seen by every head.
    """

    layers: int
    heads: int
    sinks: int
    orders: tuple[tuple[int, ...], ...]

    def __post_init__(self):
        pairs = self.layers * self.heads
        for number, order in enumerate(self.orders):
            if len(order) != pairs or set(order) != set(range(pairs)):
                raise ValueError(
                    f"the order of source scale {self.sinks + number} must name each of the "
                    f"{self.layers} x {self.heads} (layer, head) pairs once"
                )


def names() -> tuple[str, ...]:
    """Orders that come with this package."""
    return tuple(sorted(file.stem for file in FOLDER.glob("*.json")))


def read_orders(name: str) -> HeadOrders:
    """Orders by name, or of a file that `sparvar head-order` wrote.

    Raises ValueError for a file that does not hold them.
    """
    file = FOLDER / f"{name}.json" if name in names() else Path(name)
    if not file.is_file():
        raise ValueError(
            f"no head order {name!r}: give {', '.join(names())}, or a file of `sparvar head-order`"
        )
    content = read_json(file, "make it anew with `sparvar head-order`")
    found: dict[str, Any] = {
        key: content.get(key) for key in ("format", "layers", "heads", "sinks", "orders")
    }
    for key in ("format", "layers", "heads", "sinks"):
        if not isinstance(found[key], int) or not 0 < found[key] <= MOST:
            raise ValueError(f"{file}: {key} must be a number in 1..{MOST}, got {found[key]!r}")
    orders, pairs = found["orders"], found["layers"] * found["heads"]
    if found["format"] != FORMAT or not isinstance(orders, list) or len(orders) > MOST:
        raise ValueError(f"{file} holds no orders of format {FORMAT}: make it anew")
    for order in orders:
        if not isinstance(order, list) or len(order) != pairs:
            raise ValueError(f"{file}: an order must list {pairs} pairs")
        if not all(isinstance(pair, int) for pair in order):
            raise ValueError(f"{file}: an order lists whole numbers, layer * heads + head")
    return HeadOrders(
        found["layers"], found["heads"], found["sinks"], tuple(tuple(order) for order in orders)
    )


def write_orders(file: Path, orders: HeadOrders, source: str) -> None:
    """Write orders with a line that says where they come from."""
    content = {"format": FORMAT, "source": source, **dataclasses.asdict(orders)}
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(content) + "\n")


def removed_count(orders: HeadOrders, schedule: ScaleSchedule, budget: float, scale: int) -> int:
    """How many pairs no longer see any earlier scale while `scale` is drawn: the simple rule.

    budget: kept share of the rows of all scales but the last. The sinks always stay.
    """
    scales, pairs = schedule.scales, orders.layers * orders.heads
    peak, keep, before = scales[-1].offset, scales[orders.sinks].offset, scales[scale].offset
    if before <= budget * peak:
        return 0
    return min(int(np.ceil(pairs * (before - budget * peak) / (before - keep))), pairs)


def hidden(
    orders: HeadOrders, schedule: ScaleSchedule, budget: float, scale: int
) -> Bool[np.ndarray, "sources layers heads"]:
    """Which source scales (from the sinks on) a head of a layer no longer sees at `scale`."""
    found = np.zeros((len(orders.orders), orders.layers * orders.heads), bool)
    count = removed_count(orders, schedule, budget, scale)
    for number, order in enumerate(orders.orders):
        if orders.sinks + number < scale:
            found[number, list(order[:count])] = True
    return found.reshape(-1, orders.layers, orders.heads)
