"""CS4A: lists by hand, lists over every schedule, and attention against a float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import columns, cs4a
from sparvar_jax.policies.columns import Reuse, Selection
from sparvar_jax.policies.cs4a import COLUMNS, DIFFERENCE, Cs4aDecision, Cs4aSparse
from tests.policies.support import EVERY_INFINITY, SMALL, VAR, attend, cache, oracle

CLOSE = {"atol": 1e-5, "rtol": 0}
SELECTION = Selection(keep=0.3, group=24, multiple=8)


def fixed_choice(selection: Selection, place: Place, decision: int):
    """Some chosen units of the decision scale, the same for every group."""
    source = Reuse(decision, selection).source(place)
    groups = -(-source.scale.tokens // selection.group)
    count = selection.units(source)
    whole = source.kv_length // selection.granularity
    units = np.random.default_rng(3).permutation(whole)[:count]
    return jnp.asarray(np.broadcast_to(np.int32(units), (1, 1, groups, count)))


def at_later_scale(chosen, reuse: Reuse, place: Place):
    """The lists of a later scale by one program, as in a step."""
    return jax.jit(lambda chosen: columns.at_later_scale(chosen, reuse, place))(chosen)


def tokens_of(lists, counts, granularity: int, end: int) -> list[list[int]]:
    """Token numbers of every group's list; runs are cut at the end of the cache."""
    counts = np.broadcast_to(np.asarray(counts), lists.shape[:3])[0, 0]
    return [
        [
            token
            for unit in row[:count]
            for token in range(unit * granularity, min((unit + 1) * granularity, end))
        ]
        for row, count in zip(np.asarray(lists)[0, 0].tolist(), counts.tolist(), strict=True)
    ]


def test_relative_lists_by_hand():
    """Grids 1, 2x2, 4x4, groups of 8, local runs of 8 (window 1), one sink: token 0.

    Chosen [2, 0, 1], heaviest first, move to [7, 1, 5] (see the test of the map). Lists hold 8 + 3
    keys. Group 0 sees 5..12 already, so 7 and 5 repeat; group 1 has no repeats and drops the
    lightest, 5.
    """
    schedule = ScaleSchedule.of(((1, 1), (2, 2), (4, 4)))
    selection = Selection(keep=0.6, group=8, multiple=1, ranked=True)
    reuse = Reuse(1, selection, windows=(1,), mapping="relative", sinks=1)
    place = Place(schedule, "packed", 2)
    chosen = jnp.array([2, 0, 1], jnp.int32)[None, None, None]
    lists, counts = at_later_scale(chosen, reuse, place)
    assert lists.shape == (1, 1, 2, 11)
    assert counts.tolist() == [[[10, 11]]]
    assert lists[0, 0, 0, :10].tolist() == [5, 6, 7, 8, 9, 10, 11, 12, 0, 1]
    assert lists[0, 0, 1].tolist() == [13, 14, 15, 16, 17, 18, 19, 20, 0, 7, 1]


def test_scale_lists_by_hand():
    """The paper's formula, 21/5 of the index: [2, 0, 1] go to [8, 0, 4]; no sinks are added."""
    schedule = ScaleSchedule.of(((1, 1), (2, 2), (4, 4)))
    reuse = Reuse(1, Selection(0.6, 8, 1), windows=(1,), mapping="scale")
    chosen = jnp.array([2, 0, 1], jnp.int32)[None, None, None]
    lists, counts = at_later_scale(chosen, reuse, Place(schedule, "packed", 2))
    assert counts.tolist() == [[[10, 11]]]
    assert lists[0, 0, 0, :10].tolist() == [*range(5, 13), 0, 4]
    assert lists[0, 0, 1].tolist() == [*range(13, 21), 8, 0, 4]


def test_unique_first_by_hand():
    candidates = jnp.array([4, -1, 2, 4, 0, 2, 5])[None, None, None]
    lists, counts = columns.unique_first(candidates, 6, 5)
    assert counts.tolist() == [[[4]]]
    assert lists[0, 0, 0, :4].tolist() == [4, 2, 0, 5]
    lists, counts = columns.unique_first(candidates, 6, 2)
    assert (counts.tolist(), lists.tolist()) == ([[[2]]], [[[[4, 2]]]])


@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("name", [*EVERY_INFINITY, *VAR])
def test_lists_of_every_schedule(name, granularity):
    check_lists({**EVERY_INFINITY, **VAR}[name], granularity, "keep")


@pytest.mark.parametrize("mapping", ["scale", "relative"])
@pytest.mark.parametrize(("name", "granularity"), [("0.75-0.25M", 1), ("3.0-0.25M", 8)])
def test_mapped_lists(name, granularity, mapping):
    check_lists(EVERY_INFINITY[name], granularity, mapping)


def check_lists(schedule, granularity, mapping):
    """No key twice, none beyond the cache, the local windows whole, and pairs as counted."""
    decision = len(schedule) - 3
    selection = Selection(granularity=granularity, multiple=64, ranked=mapping == "relative")
    reuse = Reuse(decision, selection, mapping=mapping)
    place = Place(schedule, "packed", len(schedule) - 1)
    lists, counts = at_later_scale(fixed_choice(selection, place, decision), reuse, place)
    tokens = tokens_of(lists, counts, granularity, place.scale.end)
    windows = columns.indices.local_union(place.scale, 9, selection.group)
    for keys, union in zip(tokens, windows, strict=True):
        assert len(set(keys)) == len(keys)
        assert max(keys) < place.scale.end
        assert set(union.tolist()) <= set(keys)
    sizes = [min(192, place.scale.tokens - start) for start in range(0, place.scale.tokens, 192)]
    pairs = sum(len(keys) * size for keys, size in zip(tokens, sizes, strict=True))
    if mapping == "keep":
        assert columns.pairs(reuse, place) == pairs
    else:
        assert columns.pairs(reuse, place) >= pairs


@pytest.mark.parametrize("layout", ["packed", "aligned"])
@pytest.mark.parametrize("granularity", [1, 8])
@pytest.mark.parametrize("mapping", ["keep", "relative"])
def test_attention_over_lists(layout, granularity, mapping):
    """Decision and reuse against masks built from the lists, in float64."""
    selection = Selection(0.3, 24, 8, granularity, ranked=mapping == "relative")
    place, later = Place(SMALL, layout, 4), Place(SMALL, layout, 6)
    q, k, v = cache(place)
    dense, state = attend(Cs4aDecision(selection), q, k, v, place, {})
    flat_q, flat_k, flat_v = cache(Place(SMALL, "packed", 4))
    everything = np.ones((place.scale.tokens, place.scale.end), bool)
    exact = oracle(flat_q, flat_k, flat_v, everything)
    np.testing.assert_allclose(dense, exact, **CLOSE)
    at_decision = jax.jit(lambda chosen: columns.at_decision(chosen, selection, place))
    lists, counts = at_decision(state[COLUMNS])
    mask = mask_of(lists, counts, selection, place)
    sparse = oracle(flat_q, flat_k, flat_v, mask)
    np.testing.assert_allclose(state[DIFFERENCE], exact - sparse, **CLOSE)

    reuse = Reuse(4, selection, (3, 5), mapping, sinks=3)
    q, k, v = cache(later, seed=1)
    out, left = attend(Cs4aSparse(reuse), q, k, v, later, state)
    assert left == {}
    flat_q, flat_k, flat_v = cache(Place(SMALL, "packed", 6), seed=1)
    mask = mask_of(*at_later_scale(state[COLUMNS], reuse, later), selection, later)
    kept = jax.jit(lambda state: Cs4aSparse(reuse).kept(state, later))(state)
    assert float(kept) == pytest.approx(mask.sum((-1, -2)).mean())
    missed = columns.upsample(state[DIFFERENCE], SMALL.sizes[4], SMALL.sizes[6])
    np.testing.assert_allclose(out, oracle(flat_q, flat_k, flat_v, mask) + missed, **CLOSE)


def mask_of(lists, counts, selection: Selection, place: Place) -> np.ndarray:
    """[R, H, T, tokens] mask of lists of cache rows."""
    lists = np.asarray(lists)
    counts = np.broadcast_to(np.asarray(counts), lists.shape[:3])
    mask = np.zeros((*lists.shape[:2], place.scale.tokens, place.kv_length), bool)
    for row, head, group in np.ndindex(counts.shape):
        queries = slice(group * selection.group, (group + 1) * selection.group)
        for unit in lists[row, head, group, : counts[row, head, group]]:
            keys = slice(unit * selection.granularity, (unit + 1) * selection.granularity)
            mask[row, head, queries, keys] = True
    return mask[..., place.rows.physical(place.index)]


def test_selection_takes_the_heaviest_runs():
    place = Place(SMALL, "packed", 4)
    q, k, v = cache(place)
    sums = pallas_kernels.attention_column_sums(q, k, v, place.scale.end, 24)[1]
    for granularity in (1, 8):
        for ranked in (False, True):
            selection = Selection(0.3, 24, 8, granularity, ranked)
            select = jax.jit(functools.partial(columns.select, selection=selection, place=place))
            chosen = np.asarray(select(sums))
            whole = place.scale.end // granularity
            mass = np.asarray(sums)[..., : whole * granularity]
            mass = mass.reshape(*mass.shape[:-1], whole, granularity).sum(-1)
            best = np.argsort(-mass, -1)[..., : chosen.shape[-1]]
            expected = best if ranked else np.sort(best, -1)
            np.testing.assert_array_equal(chosen, expected)


@pytest.mark.parametrize("granularity", [1, 8])
def test_budgets_over_everything_are_dense(granularity):
    selection = Selection(1.0, 24, 8, granularity)
    state = {}
    for index in (4, 5, 6):
        place = Place(SMALL, "packed", index)
        q, k, v = cache(place, seed=index)
        reuse = Reuse(4, selection, (99,))
        strategy = Cs4aDecision(selection) if index == 4 else Cs4aSparse(reuse)
        out, left = attend(strategy, q, k, v, place, state)
        state |= left
        dense = pallas_kernels.attention(q, k, v, place.scale.end)
        np.testing.assert_allclose(out, dense, **CLOSE)
        assert strategy.pairs(place) == place.dense_pairs


def test_dropped_rows_are_ignored():
    """After the unconditional rows are gone, state of both halves serves the first rows."""
    place, later = Place(SMALL, "packed", 4), Place(SMALL, "packed", 5)
    state = attend(Cs4aDecision(SELECTION), *cache(place, rows=2), place, {})[1]
    q, k, v = cache(later, rows=2)
    both = attend(Cs4aSparse(Reuse(4, SELECTION, (3,))), q, k, v, later, state)[0]
    first = attend(Cs4aSparse(Reuse(4, SELECTION, (3,))), q[:1], k, v, later, state)[0]
    np.testing.assert_allclose(first, both[:1], **CLOSE)


@pytest.mark.unchecked
def test_refusals():
    plan = dense_plan(infinity_schedule(size="0.25M"), 4)
    with pytest.raises(ValueError, match="is the last one"):
        cs4a(-1)(plan)
    with pytest.raises(ValueError, match="keep, scale or relative"):
        cs4a(mapping="nearest")(plan)
    with pytest.raises(ValueError, match="granularity must be 1 or 8"):
        cs4a(granularity=4)
    with pytest.raises(ValueError, match="multiple of the granularity 8"):
        cs4a(granularity=8, multiple=12)
    with pytest.raises(ValueError, match=r"keep must be a share in \(0, 1\]"):
        cs4a(keep=0.0)
    with pytest.raises(ValueError, match="would replace cs4a decision"):
        cs4a()(cs4a()(plan))
