"""Schedules, layouts and rotary positions against literal values and simple invariants."""

import numpy as np
import pytest

from sparvar_jax.plans.schedule import (
    ASPECT_TABLES,
    SIZES,
    ScaleSchedule,
    infinity_schedule,
    nearest_ratio,
    rotary_channels,
    rotary_positions,
    rotary_table,
)

EVERY = [(ratio, size) for ratio in ASPECT_TABLES for size in SIZES]


def test_square_schedule_has_the_released_token_counts():
    schedule = infinity_schedule(1.0, "1M")
    offsets = [scale.offset for scale in schedule.scales]
    assert offsets == [0, 1, 5, 21, 57, 121, 265, 521, 921, 1497, 2521, 4121, 6425]
    assert schedule.tokens == 10521


def test_fifteen_ratios_with_wide_twins():
    assert sorted(ASPECT_TABLES) == [
        *(0.333, 0.4, 0.5, 0.571, 0.666, 0.75, 0.8, 1.0),
        *(1.25, 1.333, 1.5, 1.75, 2.0, 2.5, 3.0),
    ]
    assert ASPECT_TABLES[0.666] == tuple((w, h) for h, w in ASPECT_TABLES[1.5])


@pytest.mark.parametrize(
    ("asked", "found"), [(1.02, 1.0), (9 / 16, 0.571), (16 / 9, 1.75), (10.0, 3.0), (0.01, 0.333)]
)
def test_nearest_ratio(asked, found):
    assert nearest_ratio(asked) == found


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf")])
def test_impossible_ratio(ratio):
    with pytest.raises(ValueError, match="aspect ratio must be a positive number"):
        nearest_ratio(ratio)


def test_unknown_size_and_shrinking_scales():
    with pytest.raises(ValueError, match="size must be one of"):
        infinity_schedule(1.0, "4M")
    with pytest.raises(ValueError, match="must not shrink"):
        ScaleSchedule.of(((4, 4), (2, 2)))


@pytest.mark.parametrize(("ratio", "size"), EVERY)
@pytest.mark.parametrize("name", ["packed", "aligned"])
def test_layout_places_every_token_once(ratio, size, name):
    schedule = infinity_schedule(ratio, size)
    layout = schedule.layout(name)
    rows = layout.physical(len(schedule) - 1)
    assert len(rows) == schedule.tokens
    assert (np.diff(rows) > 0).all()
    assert layout.total % 128 == 0
    assert rows[-1] < layout.total
    step = 8 if name == "aligned" else 1
    for scale, span in zip(schedule.scales, layout.spans, strict=True):
        start, pitch = span.start, span.pitch
        assert rows[scale.offset] == start
        assert start % step == pitch % step == 0
    for index, scale in enumerate(schedule.scales):
        assert layout.valid(index).sum() == scale.end
        assert layout.padded(index) == (layout.filled(index) != scale.end)


def test_packed_rows_are_token_indices():
    schedule = infinity_schedule(1.5, "0.60M")
    rows = schedule.layout("packed").physical(len(schedule) - 1)
    assert np.array_equal(rows, np.arange(schedule.tokens))


def test_positions_stretch_onto_the_full_grid_at_every_size():
    # 64 / 16 = 4: the last scale of the smallest size stands at 0, 4, 8, ... of the 64 grid.
    y, x = rotary_positions(infinity_schedule(1.0, "0.06M"), 6)
    assert x[:16].tolist() == list(range(0, 64, 4))
    assert y[::16].tolist() == list(range(0, 64, 4))
    # On the 84x48 grid a row of the 56x32 scale is 1.5 wide; half goes to even: 1.5 -> 2, 4.5 -> 4.
    y, _ = rotary_positions(infinity_schedule(1.75, "1M"), 10)
    assert y[::32][:5].tolist() == [0, 2, 3, 4, 6]


def test_rotary_table_turns_first_half_with_y():
    schedule = ScaleSchedule.of(((1, 1), (2, 2)))
    cos, sin = rotary_table(schedule, 1, 8)
    # Positions (0,0), (0,1), (1,0), (1,1); inverse frequencies 1 and 0.01.
    angles = np.array(
        [[0, 0, 0, 0], [0, 0, 1, 0.01], [1, 0.01, 0, 0], [1, 0.01, 1, 0.01]], np.float32
    )
    np.testing.assert_allclose(cos, np.cos(angles), atol=1e-7)
    np.testing.assert_allclose(sin, np.sin(angles), atol=1e-7)
    channels = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    turned = (channels[:, ::2] + 1j * channels[:, 1::2]) * (cos + 1j * sin)
    wide, signed = rotary_channels(schedule, 1, 8)
    exchanged = channels.reshape(4, 4, 2)[..., ::-1].reshape(4, 8)
    got = channels * wide + exchanged * signed
    np.testing.assert_allclose(got[:, ::2] + 1j * got[:, 1::2], turned, atol=1e-6)
    with pytest.raises(ValueError, match="divisible by 4"):
        rotary_table(schedule, 1, 6)
