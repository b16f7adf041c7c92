"""Plans of HART at its released size: what the authors keep, and what other policies make of it."""

import pytest

from pallas_kernels import sparsity
from sparvar_jax.models.hart_parts import HartConfig
from sparvar_jax.policies import parse_plan
from sparvar_jax.policies.csla import Csla

CONFIG = HartConfig.preset("hart_0.7b")
# (scale, kept blocks of 128, all of them) and the share of (query, key) pairs that windows drop
KEPT = [(11, 111, 297, 0.891), (12, 217, 810, 0.931), (13, 532, 2464, 0.955)]


def plan(text):
    return parse_plan(text, CONFIG.schedule, CONFIG.depth)


def test_the_released_schedule():
    schedule = CONFIG.schedule
    ends = [300, 304, 313, 329, 354, 403, 484, 628, 884, 1325, 2054, 3350, 5654, 9750]
    assert [scale.end for scale in schedule.scales] == ends
    assert CONFIG.mlp_width == 4096
    assert CONFIG.logit_bound is None


@pytest.mark.parametrize(("scale", "kept", "total", "dropped"), KEPT)
def test_the_authors_blocks(scale, kept, total, dropped):
    paper = plan("sparvar-paper")
    (segment,) = paper.steps[scale].segments
    attention, place = segment.attention, paper.place(scale)
    assert isinstance(attention, Csla)
    geometry, windows, sinks = attention.at(place)
    assert sum(s.tokens for s in CONFIG.schedule.scales[:sinks]) == 354
    assert windows == ((-1,) * 8 + (1, 1, 1, 3, 5, 7))[: scale + 1]
    blocks = sparsity.csla_blocks(geometry, windows, sinks, 128, 128)
    assert (int(blocks.counts.sum()), total) == (
        kept,
        -(-place.scale.tokens // 128) * -(-place.scale.end // 128),
    )
    rule = Csla(attention.windows, attention.sinks, "boxes", exact=True)
    assert 1 - rule.pairs(place) / place.dense_pairs == pytest.approx(dropped, abs=5e-4)


def test_the_authors_setting_is_three_scales_of_every_layer():
    paper, fast = plan("sparvar-paper"), plan("sparvar-fast")
    for made in (paper, fast):
        sparse = [s.scale.index for s in made.steps if isinstance(s.segment(0).attention, Csla)]
        assert sparse == [11, 12, 13]
        assert all(len(step.segments) == 1 for step in made.steps)
    assert (paper.layout, fast.layout) == ("packed", "aligned")
    assert fast.density() < 0.5 > paper.density()


@pytest.mark.parametrize(
    "text",
    ["skip_last_scales(2)", "drop_uncond(3)", "adaptive", "cs4a(11) + drop_uncond(1)",
     "sparvar-fast + drop_uncond(2) + skip_last_scales(1)"],
)  # fmt: skip
def test_other_policies_plan(text):
    made = plan(text)
    assert 0 < made.density() < 1
    assert made.describe().splitlines()[1].split()[:3] == ["0", "prefix", "both"]
