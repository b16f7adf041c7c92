"""Plans: what the dense one holds, what refuses to run, how density counts."""

import dataclasses

import pytest

from sparvar_jax.plans.plan import Plan, Segment, dense_plan, map_attention
from sparvar_jax.plans.schedule import ScaleSchedule, infinity_schedule
from sparvar_jax.plans.served import with_implementation
from sparvar_jax.plans.strategy import Dense

SCHEDULE = ScaleSchedule.of(((1, 1), (2, 2), (4, 4)))


@dataclasses.dataclass(frozen=True)
class Reader(Dense):
    """A dense attention that claims to need state."""

    @property
    def name(self):
        return "reader"

    @property
    def reads(self):
        return frozenset({"mass"})


@dataclasses.dataclass(frozen=True)
class Writer(Dense):
    @property
    def writes(self):
        return frozenset({"mass"})


@dataclasses.dataclass(frozen=True)
class Half(Dense):
    """Claims to keep half of the pairs, in the packed layout only."""

    @property
    def name(self):
        return "half"

    @property
    def layouts(self):
        return ("packed",)

    def pairs(self, place):
        return place.dense_pairs / 2


def at(scale, layers, attention):
    return lambda step, layer: attention if step.scale.index == scale and layer in layers else None


def test_dense_plan_runs_everything_and_has_density_one():
    plan = dense_plan(infinity_schedule(), 32)
    assert len(plan.steps) == 13
    assert all(step.segments == (Segment((0, 32)),) for step in plan.steps)
    assert plan.density() == plan.density(None) == 1.0


def test_guidance_off_runs_conditional_rows_only():
    off = dense_plan(SCHEDULE, 2, guidance=False)
    assert {step.rows for step in off.steps} == {"cond"}
    mixed = dense_plan(SCHEDULE, 2, guidance=(True, False, True))
    assert [step.merge_at for step in mixed.steps] == [2, None, 2]
    assert {step.rows for step in mixed.steps} == {"both"}


def test_guidance_in_a_hidden_layer_splits_segments_after_it():
    plan = dense_plan(SCHEDULE, 6, merge_at=3)
    assert [segment.layers for segment in plan.steps[0].segments] == [(0, 4), (4, 6)]


def test_equal_plans_are_equal_and_hash_equal():
    one, other = dense_plan(SCHEDULE, 4), dense_plan(SCHEDULE, 4)
    assert one == other
    assert hash(one) == hash(other)
    assert one != dense_plan(SCHEDULE, 5)


def test_density_counts_kept_pairs_of_the_last_scales():
    plan = map_attention(dense_plan(SCHEDULE, 2), at(2, [1], Half()))
    # Dense pairs are 1, 4 * 5 and 16 * 21; one of two layers keeps half of the last.
    assert plan.density(1) == 0.75
    assert plan.density(None) == pytest.approx((1 + 20 + 0.75 * 336) / 357)
    assert [s.layers for s in plan.steps[2].segments] == [(0, 1), (1, 2)]


def test_reading_state_nobody_wrote_is_refused():
    base = dense_plan(SCHEDULE, 2)
    with pytest.raises(ValueError, match=r"scale 2, layer 1: reader reads \['mass'\]"):
        map_attention(base, at(2, [1], Reader()))
    plan = map_attention(base, at(1, [1], Writer()))
    plan = map_attention(plan, at(2, [1], Reader()))
    assert plan.live_after(1, 1) == {"mass"}
    assert plan.live_after(0, 1) == frozenset()


def test_layouts_and_rows_are_checked():
    plan = map_attention(dense_plan(SCHEDULE, 2), at(2, [0], Half()))
    with pytest.raises(ValueError, match="half cannot read the aligned cache layout, only packed"):
        dataclasses.replace(plan, layout="aligned")
    grown = dataclasses.replace(plan.steps[0], rows="cond", merge_at=None)
    with pytest.raises(ValueError, match="rows dropped earlier have no cache"):
        Plan(SCHEDULE, "packed", (grown, *plan.steps[1:]))
    with pytest.raises(ValueError, match="first scales of the schedule"):
        Plan(SCHEDULE, "packed", plan.steps[1:])


def test_implementation_is_set_everywhere():
    plan = with_implementation(dense_plan(SCHEDULE, 2), "xla")
    assert {step.segments[0].attention for step in plan.steps} == {Dense("xla")}


def test_describe_names_scales_and_density():
    text = dense_plan(SCHEDULE, 2).describe()
    assert "4x4" in text
    assert "density 1.000" in text
