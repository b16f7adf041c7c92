"""Index arithmetic: literal small cases, and properties over every schedule."""

import jax
import numpy as np
import pytest

from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.policies import columns, indices
from tests.policies.support import EVERY_INFINITY, SMALL, VAR_256


def test_scale_index():
    square = infinity_schedule()
    assert indices.scale_index(square, 10) == indices.scale_index(square, -3) == 10
    assert indices.scale_index(square, 0.39) == 10
    assert indices.scale_index(infinity_schedule(size="0.25M"), 0.39) == 7
    assert indices.scale_index(VAR_256, -1) == 9
    for wrong in (13, -14, 1.5, 0.0):
        with pytest.raises(ValueError, match=r"scale|share"):
            indices.scale_index(square, wrong)


def test_token_share_finds_the_decision_scale_of_every_ratio():
    for name, schedule in EVERY_INFINITY.items():
        if name.endswith("1M"):
            assert indices.scale_index(schedule, 0.39) == 10, name


def test_kept_count():
    assert indices.kept_count(4121, 0.2, 112) == 784
    assert indices.kept_count(4121, 0.2, 64) == 832
    assert indices.kept_count(4121, 1.0, 112) == 4121
    assert indices.kept_count(55, 0.2, 112) == 55
    assert indices.kept_count(280, 0.2, 112) == 112  # 0.5 of a multiple rounds to even, then to one
    assert indices.kept_count(840, 0.2, 112) == 224  # 1.5 rounds to 2


def test_group_map():
    assert indices.group_map(2, 3).tolist() == [0, 0, 1]
    assert indices.group_map(3, 3).tolist() == [0, 1, 2]
    assert indices.group_map(1, 4).tolist() == [0, 0, 0, 0]


def test_window_counted_from_the_end():
    assert [indices.window_of((7, 9), i, 13) for i in (9, 10, 11, 12)] == [7, 7, 7, 9]


def test_local_union_is_the_union_of_windows():
    scale = SMALL.scales[5]
    for window in (-1, 1, 4, 5, 99):
        for group in (1, 7, 80):
            unions = indices.local_union(scale, window, group)
            assert len(unions) == -(-scale.tokens // group)
            for number, union in enumerate(unions):
                seen = set()
                for token in range(number * group, min((number + 1) * group, scale.tokens)):
                    y, x = divmod(token, scale.width)
                    for ky in range(scale.height):
                        for kx in range(scale.width):
                            if max(abs(ky - y), abs(kx - x)) <= window // 2:
                                seen.add(scale.offset + ky * scale.width + kx)
                assert union.tolist() == sorted(seen)


@pytest.mark.parametrize("name", EVERY_INFINITY)
def test_local_runs_hold_their_union(name):
    schedule = EVERY_INFINITY[name]
    for scale in schedule.scales[-2:]:
        starts, length = indices.local_runs(scale, 7, 192, 112)
        assert (starts >= scale.offset).all()
        assert (starts + length <= scale.end).all()
        for start, union in zip(starts, indices.local_union(scale, 7, 192), strict=True):
            assert start <= union[0]
            assert union[-1] < start + length


def test_relative_map_by_hand():
    """Grids 1, 2x2, 4x4; decision 1, current 2: everything moves on by one scale.

    Token 0 goes to cell (0, 0) of the 2x2 grid, token 1. The cells (0,0), (0,1), (1,0), (1,1) of
    the 2x2 grid go to (0,0), (0,2), (2,0), (2,2) of the 4x4 grid, which starts at token 5.
    """
    scales = ScaleSchedule.of(((1, 1), (2, 2), (4, 4))).scales
    assert indices.relative_map(scales, 1, 2).tolist() == [1, 5, 7, 13, 15]
    assert indices.relative_map(scales, 1, 1).tolist() == [0, 1, 2, 3, 4]


def test_scale_map_by_hand():
    assert indices.scale_map(5, 21).tolist() == [0, 4, 8, 12, 16]


@pytest.mark.parametrize("name", EVERY_INFINITY)
def test_maps_stay_inside(name):
    schedule = EVERY_INFINITY[name]
    scales, last = schedule.scales, len(schedule) - 1
    table = indices.relative_map(scales, last - 2, last)
    assert len(table) == scales[last - 2].end
    assert table.min() >= 0
    assert table.max() < scales[last].end
    straight = indices.scale_map(scales[last - 2].end, scales[last].end)
    assert (np.diff(straight) > 0).all()
    assert straight[-1] < scales[last].end


def test_upsampling_is_half_pixel_bilinear():
    x = jax.random.normal(jax.random.key(0), (2, 3, 5 * 4, 6))
    ours = columns.upsample(x, (5, 4), (13, 11))
    grid = x.reshape(2, 3, 5, 4, 6)
    theirs = jax.image.resize(grid, (2, 3, 13, 11, 6), "bilinear").reshape(2, 3, -1, 6)
    np.testing.assert_allclose(ours, theirs, atol=2e-6)
