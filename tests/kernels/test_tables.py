"""Sparsity containers, schedules and tuning values: numpy only."""

import json
import pathlib

import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import boxes_table, shapes
from pallas_kernels.hopper import tuning
from pallas_kernels.hopper.schedule import balanced_order, strided_order
from pallas_kernels.sparsity import density, window_bounds

SQUARE = pk.Geometry.packed(shapes.SQUARE_GRIDS)


def test_authors_mask_of_the_last_scale():
    """435 of 2656 blocks and 1.92 % of the token pairs, as the paper's code counts them."""
    blocks = pk.csla_blocks(SQUARE, shapes.CSLA_WINDOWS, shapes.CSLA_SINKS)
    assert blocks.counts.sum() == 435
    assert density(blocks, 4096) == pytest.approx(0.16477164718182682)
    rule = pk.token_rule(SQUARE, shapes.CSLA_WINDOWS, shapes.CSLA_SINKS)
    assert rule.mean() == pytest.approx(0.01919848844408989)


def test_small_mask_spelled_out():
    geometry = pk.Geometry.packed(((1, 1), (2, 2), (1, 4)))
    rule = pk.token_rule(geometry, (-1, 1, 3), 1)
    # Columns: the sink, the 2x2 grid (only its first row is under a 1-row query), the query grid.
    expected = [
        "1 1000 1100",
        "1 1000 1110",  # x = 1 -> 0.5, which rounds half to even: 0
        "1 0100 0111",
        "1 0000 0011",  # x = 3 -> 1.5 -> 2: outside the grid, so that scale is hidden
    ]
    got = ["".join("01"[int(b)] for b in row) for row in rule]
    assert got == [line.replace(" ", "") for line in expected]


def test_window_of_minus_one_sees_nothing():
    low, high = window_bounds(8, 8, -1)
    assert (high < low).all()


def test_lists_put_the_ragged_block_first():
    mask = np.array([[True, False, True], [False, False, False], [True, True, True]])
    blocks = pk.blocks_from_mask(mask, 300)
    np.testing.assert_array_equal(blocks.counts, [2, 0, 3])
    np.testing.assert_array_equal(blocks.indices[2], [2, 1, 0])


def test_aligned_rows_and_gaps():
    geometry = pk.Geometry.aligned(((1, 1), (2, 3)))
    assert [(g.row, g.pitch) for g in geometry.keys] == [(0, 8), (8, 8)]
    assert geometry.gaps == ((1, 8), (11, 16), (19, 24))
    assert geometry.kv_length == 24


def test_patches_cover_every_query_once():
    index = boxes_table.tile_queries(SQUARE, 8, 16)
    assert sorted(index.reshape(-1)) == list(range(4096))


def test_boxes_hold_the_designed_number_of_keys():
    table = boxes_table.tile_keys(SQUARE, shapes.CSLA_WINDOWS, shapes.CSLA_SINKS)
    assert table.valid.sum(1).mean() == pytest.approx(681.5625)


@pytest.mark.parametrize("geometry", [SQUARE, pk.Geometry.aligned(((2, 3), (5, 18), (9, 21)))])
def test_mask_words_hold_the_token_rule(geometry):
    """Unpack one bit per (thread, register) pair and compare with the rule, pair by pair."""
    windows = shapes.CSLA_WINDOWS if geometry is SQUARE else (-1, 3, 5)
    sinks = shapes.CSLA_SINKS if geometry is SQUARE else 1
    table = boxes_table.tile_keys(geometry, windows, sinks)
    words = boxes_table.mask_words(geometry, windows, sinks).view(np.uint32)
    index = boxes_table.tile_queries(geometry, 8, 16)
    rule = pk.token_rule(geometry, windows, sinks)
    rng = np.random.default_rng(0)
    for _ in range(300):
        tile = rng.integers(len(index))
        row, key = rng.integers(128), rng.integers(table.rows.shape[1])
        group, within = divmod(row, 64)
        stage, column = divmod(key, 64)
        thread = within // 16 * 32 + within % 8 * 4 + column % 8 // 2
        bit = 16 * (within % 16 // 8) + 2 * (column // 8) + column % 2
        query = index[tile, row]
        if query >= rule.shape[0]:
            continue
        want = table.valid[tile, key] and rule[query, table.rows[tile, key]]
        assert bool(words[tile, stage, group, thread] >> bit & 1) == want


def test_stages_beyond_the_keys_hide_everything():
    geometry = pk.Geometry.packed(((2, 3), (4, 5)))
    words = boxes_table.mask_words(geometry, (-1, 3), 1, least_stages=3)
    assert words.shape[1] == 3
    assert words[:, 0].any()
    assert not words[:, 1:].any()


@pytest.mark.parametrize(("items", "ctas"), [(1792, 132), (7, 132), (264, 132)])
def test_every_item_is_served_once(items, ctas):
    work = np.random.default_rng(0).integers(1, 20, items)
    for order, lengths in (
        balanced_order(work, min(ctas, items)),
        strided_order(items, min(ctas, items)),
    ):
        served = [item for row, n in zip(order, lengths, strict=True) for item in row[:n]]
        assert sorted(served) == list(range(items))


def test_balanced_order_beats_striding():
    work = np.resize([10, 10, 15, 15, 13, 14], 1792)
    order, lengths = balanced_order(work, 132)
    load = [work[row[:n]].sum() for row, n in zip(order, lengths, strict=True)]
    assert max(load) <= np.mean(load) * 1.05


def test_tuned_values_are_valid_configurations():
    table = json.loads((pathlib.Path(tuning.__file__).with_name("tuning.json")).read_text())
    for entries in table.values():
        for key, values in entries.items():
            kind = key.split("/")[0]
            if kind in ("dense", "blocks"):
                tuning.BlockListConfig(**values)
            elif kind == "column_sums":
                tuning.ColumnSumsConfig(**values)
            else:
                tuning.GatherConfig(**values)


@pytest.mark.parametrize(
    "make",
    [
        lambda: tuning.BlockListConfig(consumers=4),
        lambda: tuning.BlockListConfig(block_k=100),
        lambda: tuning.GatherConfig(lag=4, stages=4),
        lambda: tuning.ColumnSumsConfig(consumers=0),
    ],
)
def test_impossible_configurations_are_refused(make):
    with pytest.raises(ValueError, match="must"):
        make()
