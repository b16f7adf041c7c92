"""CSLA: its masks against a brute-force rule, its forms against each other, and refusals."""

import numpy as np
import pytest

import pallas_kernels
from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.plans.strategy import Place
from sparvar_jax.policies import csla
from sparvar_jax.policies.csla import WINDOWS, Csla, windows_of
from tests.policies.support import EVERY_RATIO, SMALL, VAR, attend, cache, oracle

SMALL_WINDOWS = (-1, -1, -1, 1, 3, 5, 7)
# float32 attention with scores of a few units: tens of roundings of 2^-24.
CLOSE = {"atol": 1e-5, "rtol": 0}


def rule(place: Place, windows, sinks: int) -> np.ndarray:
    """The token rule, token by token."""
    scale = place.scale
    mask = np.zeros((scale.tokens, scale.end), bool)
    for query in range(scale.tokens):
        qy, qx = divmod(query, scale.width)
        for key in place.schedule.scales[: place.index + 1]:
            cy = round(float(np.float32(qy) / np.float32(scale.height) * np.float32(key.height)))
            cx = round(float(np.float32(qx) / np.float32(scale.width) * np.float32(key.width)))
            for token in range(key.tokens):
                ky, kx = divmod(token, key.width)
                near = max(abs(ky - cy), abs(kx - cx)) <= windows[key.index] // 2
                mask[query, key.offset + token] = near or key.index < sinks
    return mask


@pytest.mark.parametrize("sinks", [0, 3])
def test_exact_boxes_follow_the_token_rule(sinks):
    place = Place(SMALL, "aligned", 6)
    mask = rule(place, SMALL_WINDOWS, sinks)
    strategy = Csla(SMALL_WINDOWS, sinks, "boxes", exact=True)
    assert strategy.pairs(place) == mask.sum()
    out, left = attend(strategy, *cache(place), place, {})
    assert left == {}
    q, k, v = cache(Place(SMALL, "packed", 6))
    np.testing.assert_allclose(out, oracle(q, k, v, mask), **CLOSE)


def test_boxes_agree_between_layouts():
    outs = []
    for layout in ("packed", "aligned"):
        place = Place(SMALL, layout, 6)
        outs.append(attend(Csla(SMALL_WINDOWS, 3, "boxes"), *cache(place), place, {})[0])
    np.testing.assert_allclose(*outs, **CLOSE)


@pytest.mark.parametrize("block", [64, 128])
def test_blocks_keep_every_block_the_rule_touches(block):
    place = Place(SMALL, "packed", 6)
    mask = rule(place, SMALL_WINDOWS, 3)
    kept = np.zeros_like(mask)
    for top in range(0, mask.shape[0], block):
        for left in range(0, mask.shape[1], block):
            tile = np.s_[top : top + block, left : left + block]
            kept[tile] = mask[tile].any()
    strategy = Csla(SMALL_WINDOWS, 3, block=block)
    assert strategy.pairs(place) == pytest.approx(kept.sum())
    q, k, v = cache(place)
    np.testing.assert_allclose(
        attend(strategy, q, k, v, place, {})[0], oracle(q, k, v, kept), **CLOSE
    )


@pytest.mark.parametrize("form", ["blocks", "boxes"])
def test_windows_over_everything_are_dense(form):
    place = Place(SMALL, "aligned" if form == "boxes" else "packed", 6)
    q, k, v = cache(place)
    out = attend(Csla((99,) * 7, 0, form), q, k, v, place, {})[0]
    q, k, v = cache(Place(SMALL, "packed", 6))
    dense = pallas_kernels.attention(q, k, v, SMALL.tokens)
    np.testing.assert_allclose(out, dense, **CLOSE)
    assert Csla((99,) * 7, 0, form).pairs(place) == pytest.approx(place.dense_pairs)


@pytest.mark.parametrize("name", EVERY_RATIO)
def test_every_ratio_sees_sinks_and_itself(name):
    """With the released windows every query sees all sinks and its own place."""
    schedule = EVERY_RATIO[name]
    place = Place(schedule, "packed", 9)
    geometry, windows, sinks = Csla().at(place)
    mask = pallas_kernels.token_rule(geometry, windows, sinks)
    assert mask[:, : schedule.scales[5].offset].all()
    own = mask[:, place.scale.offset :]
    assert own.diagonal().all()
    assert Csla(form="boxes", exact=True).pairs(place) == mask.sum()
    sizes = [Csla(form=f, exact=e).pairs(place) for f, e in (("boxes", True), ("boxes", False))]
    assert sizes[0] <= sizes[1] <= place.dense_pairs
    assert mask.sum() <= Csla().pairs(place) <= place.dense_pairs


@pytest.mark.parametrize("name", [*EVERY_RATIO, *VAR])
def test_plans_for_every_schedule(name):
    schedule = {**EVERY_RATIO, **VAR}[name]
    plan = csla(form="boxes")(dense_plan(schedule, 2))
    changed = [s.scale.index for s in plan.steps if s.segments[0].attention.name != "dense"]
    assert changed == list(range(len(schedule) - 3, len(schedule)))
    assert plan.layout == "aligned"
    assert 0 < plan.density() < 1


def test_windows_are_counted_from_the_end():
    assert windows_of(WINDOWS, 10) == (-1, -1, -1, -1, -1, 1, 1, 3, 5, 7)
    assert windows_of((3,), 4) == (-1, -1, -1, 3)


@pytest.mark.unchecked
def test_refusals():
    plan = dense_plan(infinity_schedule(size="0.25M"), 4)
    with pytest.raises(ValueError, match="exact windows need form='boxes'"):
        csla(exact=True)
    with pytest.raises(ValueError, match="blocks' or 'boxes"):
        csla(form="rings")
    with pytest.raises(ValueError, match="would replace csla blocks 128"):
        csla(form="boxes")(csla()(plan))
    with pytest.raises(ValueError, match="cannot read the aligned cache layout"):
        csla(layers=(2, 4))(csla(form="boxes", layers=(0, 2))(plan))
    with pytest.raises(ValueError, match=r"within 0\.\.4"):
        csla(layers=(2, 9))(plan)
