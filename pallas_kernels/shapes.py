"""Integer helpers and the named real-model shapes shared by tests, tuning and benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

SQUARE_GRIDS = tuple((side, side) for side in (1, 2, 4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64))
CSLA_WINDOWS = (-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 3, 5, 7)
CSLA_SINKS = 5


def ceil_div(value: int, divisor: int) -> int:
    """Quotient rounded up."""
    return -(-value // divisor)


def round_up(value: int, multiple: int) -> int:
    """Smallest multiple that is not below `value`."""
    return ceil_div(value, multiple) * multiple


@dataclass(frozen=True)
class AttentionShape:
    """One attention call of a released model: `queries` tokens against `keys` valid cache rows."""

    name: str
    queries: int
    keys: int
    heads: int
    head_dim: int = 128

    def flops(self, rows: int, density: float = 1.0) -> float:
        """Multiply-adds of both products, counted as two operations each."""
        return 4.0 * rows * self.heads * self.queries * self.keys * self.head_dim * density


def _scales(model: str, heads: int) -> tuple[AttentionShape, ...]:
    sizes = {10: (1600, 4121), 11: (2304, 6425), 12: (4096, 10521)}
    return tuple(
        AttentionShape(f"{model}/scale{scale}", queries, keys, heads)
        for scale, (queries, keys) in sizes.items()
    )


SHAPES = {
    shape.name: shape
    for shape in (
        *_scales("2b", 16),
        *_scales("8b", 28),
        AttentionShape("hart", 4096, 9750, 24, 64),
    )
}
