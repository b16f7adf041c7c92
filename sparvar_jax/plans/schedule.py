"""Scale schedules and rotary tables: plain Python and numpy, used at trace time.

A schedule is the sequence of token grids a model draws, from 1x1 to the final one; in some families
a prefix of text stands before them.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools

import numpy as np
from jaxtyping import Float

from sparvar_jax.plans.rows import LayoutName, RowMap, row_map
from sparvar_jax.weights.told import shown

SIZES = {"0.06M": 7, "0.25M": 10, "0.60M": 12, "1M": 13}

_SQUARE = "1x1 2x2 4x4 6x6 8x8 12x12 16x16 20x20 24x24 32x32 40x40 48x48 64x64"
_TALL = {
    1.25: "1x1 2x2 3x3 5x4 10x8 15x12 20x16 25x20 30x24 35x28 45x36 55x44 70x56",
    1.333: "1x1 2x2 4x3 8x6 12x9 16x12 20x15 24x18 28x21 36x27 48x36 60x45 72x54",
    1.5: "1x1 2x2 3x2 6x4 9x6 15x10 21x14 27x18 33x22 39x26 48x32 63x42 78x52",
    1.75: "1x1 2x2 3x3 7x4 11x6 14x8 21x12 28x16 35x20 42x24 56x32 70x40 84x48",
    2.0: "1x1 2x2 4x2 6x3 10x5 16x8 22x11 30x15 38x19 46x23 60x30 74x37 90x45",
    2.5: "1x1 2x2 5x2 10x4 15x6 20x8 25x10 30x12 40x16 50x20 65x26 80x32 100x40",
    3.0: "1x1 2x2 6x2 9x3 15x5 21x7 27x9 36x12 45x15 54x18 72x24 90x30 111x37",
}


def _parse(text: str) -> tuple[tuple[int, int], ...]:
    return tuple((int(h), int(w)) for h, w in (item.split("x") for item in text.split()))


def _tables() -> dict[float, tuple[tuple[int, int], ...]]:
    tables = {1.0: _parse(_SQUARE)}
    for ratio, text in _TALL.items():
        tall = _parse(text)
        tables[ratio] = tall
        tables[int(1000 / ratio) / 1000] = tuple((w, h) for h, w in tall)
    return tables


ASPECT_TABLES: dict[float, tuple[tuple[int, int], ...]] = _tables()
"""height/width ratio -> the 13 (height, width) grids of its 1M schedule (model family Infinity)."""


def nearest_ratio(height_over_width: float) -> float:
    """The supported height/width ratio closest to the requested one.

    Raises ValueError for a ratio that is not a positive finite number.
    """
    if not np.isfinite(height_over_width) or height_over_width <= 0:
        raise ValueError(
            f"aspect ratio must be a positive number, got {height_over_width}: "
            "give W:H such as 16:9, or height/width as a number"
        )
    return min(ASPECT_TABLES, key=lambda ratio: abs(ratio - height_over_width))


@dataclasses.dataclass(frozen=True)
class Scale:
    """One token grid of a schedule. `offset` counts the tokens of all earlier scales.

    grid: False for a prefix: `width` tokens of text that form no grid.
    """

    index: int
    height: int
    width: int
    offset: int
    grid: bool = True

    @property
    def tokens(self) -> int:
        return self.height * self.width

    @property
    def end(self) -> int:
        """Tokens up to and including this scale."""
        return self.offset + self.tokens


@dataclasses.dataclass(frozen=True)
class ScaleSchedule:
    """The grids a model draws, in order.

    sizes: (height, width) of every scale; grids never shrink.
    rotary_grid: the (height, width) onto which rotary positions are stretched. Infinity uses the
        last grid of the 1M schedule of the same aspect ratio for every picture size.
    prefix: scale 0 is no grid but a row (1, n) of n tokens of text, which every later token sees.
    """

    sizes: tuple[tuple[int, int], ...]
    rotary_grid: tuple[int, int]
    prefix: bool = False

    def __post_init__(self):
        if len(self.sizes) <= self.prefix:
            raise ValueError("a schedule needs at least one scale, got none")
        if min(min(size) for size in self.sizes) < 1:
            raise ValueError(f"scales hold at least one token, got {self.sizes}")
        if self.prefix and self.sizes[0][0] != 1:
            raise ValueError(f"a prefix of n tokens has the size (1, n), got {self.sizes[0]}")
        grids = self.sizes[self.prefix :]
        for before, after in itertools.pairwise(grids):
            if after[0] < before[0] or after[1] < before[1]:
                raise ValueError(f"scales must not shrink, got {before} before {after}")

    @classmethod
    def of(cls, sizes: tuple[tuple[int, int], ...], *, prefix: int = 0) -> ScaleSchedule:
        """A schedule whose rotary grid is its own last scale. prefix: tokens of text before it."""
        sizes = tuple((int(h), int(w)) for h, w in sizes)
        first = ((1, int(prefix)),) if prefix else ()
        return cls(first + sizes, sizes[-1], bool(prefix))

    @property
    def scales(self) -> tuple[Scale, ...]:
        return _scales(self.sizes, self.prefix)

    @property
    def final(self) -> tuple[int, int]:
        return self.sizes[-1]

    @property
    def tokens(self) -> int:
        """Tokens of all scales together."""
        return self.scales[-1].end

    @property
    def text(self) -> int:
        """Tokens of the prefix, 0 without one."""
        return self.scales[0].tokens if self.prefix else 0

    def __len__(self) -> int:
        return len(self.sizes)

    def layout(self, name: LayoutName = "packed") -> RowMap:
        """Where the tokens of this schedule live in a cache of the named layout."""
        return row_map(self.sizes, name, self.prefix)


@functools.lru_cache
def _scales(sizes: tuple[tuple[int, int], ...], prefix: bool) -> tuple[Scale, ...]:
    scales, offset = [], 0
    for index, (height, width) in enumerate(sizes):
        scales.append(Scale(index, height, width, offset, grid=index > 0 or not prefix))
        offset += height * width
    return tuple(scales)


def infinity_schedule(height_over_width: float = 1.0, size: str = "1M") -> ScaleSchedule:
    """The released text-to-image schedule nearest to an aspect ratio, at a picture size.

    size: "0.06M", "0.25M", "0.60M" or "1M"; the smaller ones are prefixes of the 1M schedule and
    keep its rotary grid. Raises ValueError for an unknown size or an impossible ratio.
    """
    if not isinstance(size, str) or size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, got {shown(size)}")
    table = ASPECT_TABLES[nearest_ratio(height_over_width)]
    return ScaleSchedule(table[: SIZES[size]], table[-1])


def rotary_positions(
    schedule: ScaleSchedule, scale: int
) -> tuple[Float[np.ndarray, "tokens"], Float[np.ndarray, "tokens"]]:
    """The (y, x) rotary position of every token of a scale, stretched onto the rotary grid.

    Positions are `round_half_even(i * (grid / side))` with float32 products, as released.
    """
    height, width = schedule.sizes[scale]
    grid_height, grid_width = schedule.rotary_grid
    y = np.round(np.arange(height, dtype=np.float32) * np.float32(grid_height / height))
    x = np.round(np.arange(width, dtype=np.float32) * np.float32(grid_width / width))
    return np.repeat(y, width), np.tile(x, height)


@functools.lru_cache(maxsize=256)
def rotary_channels(
    schedule: ScaleSchedule, scale: int, head_dim: int
) -> tuple[Float[np.ndarray, "tokens D"], Float[np.ndarray, "tokens D"]]:
    """(cos, sin) of `rotary_table` for every channel of a head; sin is negative at even ones.

    A head x then turns to `x * cos + y * sin`, y being x with the neighbours of a pair exchanged.
    """
    cos, sin = rotary_table(schedule, scale, head_dim)
    return np.repeat(cos, 2, axis=1), np.stack([-sin, sin], axis=-1).reshape(len(sin), head_dim)


@functools.lru_cache(maxsize=256)
def rotary_table(
    schedule: ScaleSchedule, scale: int, head_dim: int, base: float = 10000.0
) -> tuple[Float[np.ndarray, "tokens half"], Float[np.ndarray, "tokens half"]]:
    """(cos, sin) of a scale's 2D rotary angles, float32: the first half of them turn with y.

    Angle `a` rotates the adjacent pair (2a, 2a + 1) of a head. Raises ValueError unless the head
    dim is a multiple of 4.
    """
    if head_dim % 4:
        raise ValueError(f"2D rotary embedding needs a head dim divisible by 4, got {head_dim}")
    axis = head_dim // 2
    inverse = 1.0 / base ** (np.arange(0, axis, 2, dtype=np.float32) / np.float32(axis))
    y, x = rotary_positions(schedule, scale)
    angles = np.concatenate([np.outer(y, inverse), np.outer(x, inverse)], axis=1)
    angles = angles.astype(np.float32)
    return np.cos(angles), np.sin(angles)
