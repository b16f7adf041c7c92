"""Adaptive selection: carrying and choosing by hand, and attention against an oracle."""

import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import adaptive
from sparvar_jax.policies.adaptive import (
    MASS,
    AdaptiveDecision,
    AdaptiveSparse,
    block_mass,
    carry_mass,
    carry_matrices,
    choose_blocks,
)
from tests.policies.support import EVERY_INFINITY, VAR, VAR_256, attend, cache, oracle

MIDDLE = ScaleSchedule.of(tuple((s, s) for s in (1, 2, 4, 6, 9, 12, 16)))


def test_block_mass_by_hand():
    """Two query blocks, five keys in blocks of two; rows become shares of one."""
    sums = jnp.array([[1.0, 1.0, 0.0, 1.0, 1.0], [0.0, 2.0, 0.0, 0.0, 0.0]])[None, None]
    assert block_mass(sums, 2)[0, 0].tolist() == [[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]


def test_carrying_by_hand():
    """Grids 1, 2x2, 4x4 in blocks of 4 tokens, from scale 1 to scale 2.

    Source key blocks: tokens 0..3, and 4. Token 0 covers the 2x2 grid, tokens 1..4; token 1 covers
    5, 6, 9, 10; token 2 covers 7, 8, 11, 12; token 3 covers 13, 14, 17, 18; token 4 covers 15, 16,
    19, 20. So the first block lands on blocks 0..4, the second on 3, 4, 5. All four query blocks
    of the 4x4 grid come from the one of the 2x2 grid.
    """
    place = Place(ScaleSchedule.of(((1, 1), (2, 2), (4, 4))), "packed", 2)
    queries, keys = carry_matrices(place, 1, 4, 4)
    assert queries.tolist() == [[1.0]] * 4
    expected = np.array([[1 / 5] * 5 + [0], [0] * 3 + [1 / 3] * 3], np.float32)
    np.testing.assert_array_equal(keys, expected)
    carried = carry_mass(jnp.array([0.6, 0.4])[None, None, None], place, 1, 4, 4)
    row = [0.12, 0.12, 0.12, 0.12 + 0.4 / 3, 0.12 + 0.4 / 3, 0.4 / 3]
    np.testing.assert_allclose(carried[0, 0], [row] * 4, atol=1e-6)


def test_choosing_by_hand():
    """Block 0 is a sink and comes first; 0.1 + 0.4 + 0.25 reaches 0.7, all but 0.05 reach 0.9."""
    mass = jnp.array([0.1, 0.4, 0.05, 0.25, 0.2])[None, None, None]
    for coverage, floor, cap, count in (
        (0.7, 1, 5, 3),
        (0.9, 1, 5, 4),
        (0.9, 1, 3, 3),
        (0.1, 2, 5, 2),
    ):
        blocks, counts = choose_blocks(mass, coverage, 1, floor, cap)
        assert counts.tolist() == [[[count]]]
        assert blocks[0, 0, 0].tolist() == [0, 1, 3, 4, 2][:cap]


@pytest.mark.parametrize("layout", ["packed", "aligned"])
def test_attention_over_chosen_blocks(layout):
    place, later = Place(MIDDLE, layout, 4), Place(MIDDLE, layout, 6)
    _, state = attend(AdaptiveDecision(64), *cache(place), place, {})
    assert state[MASS].shape == (1, 2, 1, -(-place.kv_length // 64))
    np.testing.assert_allclose(state[MASS].sum(-1), 1, atol=1e-6)
    strategy = AdaptiveSparse(4, 0.6, 0.6, 0.0, 64, sinks=2)
    q, k, v = cache(later, seed=2)
    out, left = attend(strategy, q, k, v, later, state)
    assert left == {}
    table = strategy.table(state[MASS], later)
    blocks, counts = np.asarray(table.indices), np.asarray(table.counts)
    assert counts.min() >= 1
    assert counts.max() <= blocks.shape[-1] < -(-later.kv_length // 64)
    mask = np.zeros((1, 2, later.scale.tokens, later.kv_length), bool)
    for row, head, query in np.ndindex(counts.shape):
        for key in blocks[row, head, query, : counts[row, head, query]]:
            where = np.s_[query * 128 : query * 128 + 128, key * 64 : key * 64 + 64]
            mask[row, head][where] = True
    mask = mask[..., later.rows.physical(later.index)]
    kept = mask.sum((-1, -2)).mean()
    assert float(strategy.kept(state, later)) == pytest.approx(kept)
    assert kept <= strategy.pairs(later)
    flat = cache(Place(MIDDLE, "packed", 6), seed=2)
    np.testing.assert_allclose(out, oracle(*flat, mask), atol=1e-5)


def test_floor_over_everything_is_dense():
    place, later = Place(MIDDLE, "packed", 4), Place(MIDDLE, "packed", 6)
    state = attend(AdaptiveDecision(), *cache(place), place, {})[1]
    q, k, v = cache(later)
    strategy = AdaptiveSparse(4, cap=1.0, floor=1.0)
    out = attend(strategy, q, k, v, later, state)[0]
    np.testing.assert_allclose(out, pallas_kernels.attention(q, k, v, MIDDLE.tokens), atol=1e-5)
    assert strategy.pairs(later) == later.dense_pairs


@pytest.mark.parametrize("name", [*EVERY_INFINITY, *VAR])
def test_carrying_keeps_the_mass(name):
    """Whatever lands is all there; every later query block comes from somewhere."""
    schedule = {**EVERY_INFINITY, **VAR}[name]
    decision, last = len(schedule) - 3, len(schedule) - 1
    queries, keys = carry_matrices(Place(schedule, "aligned", last), decision, 128)
    np.testing.assert_allclose(queries.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(keys.sum(1), 1, atol=1e-6)
    assert queries.shape == (
        -(-schedule.scales[last].tokens // 128),
        -(-schedule.scales[decision].tokens // 128),
    )
    plan = adaptive()(dense_plan(schedule, 2))
    assert 0 < plan.density() < 1


def test_refusals():
    plan = dense_plan(VAR_256, 4)
    with pytest.raises(ValueError, match="coverage must be a share"):
        adaptive(coverage=1.5)(plan)
    with pytest.raises(ValueError, match="0 <= floor <= cap <= 1"):
        adaptive(cap=0.1, floor=0.2)(plan)
    with pytest.raises(ValueError, match="is the last one"):
        adaptive(first_scale=-1)(plan)
