"""Plans from text, presets against the published configuration, and dropping work."""

import pytest

from sparvar_jax.plans.plan import dense_plan
from sparvar_jax.plans.schedule import infinity_schedule
from sparvar_jax.policies import (
    cs4a,
    csla,
    drop_uncond,
    parse_plan,
    parse_policy,
    preset_names,
    skip_last_scales,
    sparvar,
)
from sparvar_jax.policies.sparvar import boundary_layer, released_boundary
from tests.policies.support import EVERY_RATIO, VAR

SQUARE = infinity_schedule()


def test_paper_preset_is_the_shipped_configuration():
    plan = parse_plan("sparvar-paper", SQUARE, 32)
    written_out = csla(
        windows=(-1, -1, -1, -1, -1, -1, -1, -1, 1, 1, 3, 5, 7),
        sinks=5,
        form="blocks",
        block=128,
        first_scale=10,
        layers=(11, 32),
    )(
        cs4a(
            decision_scale=10,
            keep=0.2,
            group=192,
            multiple=112,
            granularity=1,
            windows=(7, 9),
            cache=True,
            mapping="keep",
            layers=(0, 11),
        )(dense_plan(SQUARE, 32))
    )
    assert plan == written_out
    kept = {
        (step.scale.index, segment.layers): round(
            segment.attention.pairs(plan.place(i)) / step.scale.tokens
        )
        for i, step in enumerate(plan.steps[10:], 10)
        for segment in step.segments
    }
    assert kept == {
        (10, (0, 11)): 4121,
        (10, (11, 32)): 884,
        (11, (0, 11)): 1344,
        (11, (11, 32)): 1189,
        (12, (0, 11)): 2128,
        (12, (11, 32)): 1734,
    }
    assert all(s.name == "dense" for step in plan.steps[:10] for s in map(_of, step.segments))


def _of(segment):
    return segment.attention


def test_boundary():
    assert [released_boundary(depth) for depth in (32, 40, 8, 16, 1)] == [10, 10, 2, 5, 0]
    assert boundary_layer(0.5, 8) == 3
    with pytest.raises(ValueError, match="share of the layers"):
        sparvar(10)(dense_plan(SQUARE, 8))


@pytest.mark.parametrize("name", preset_names())
@pytest.mark.parametrize("schedule", [*EVERY_RATIO.values(), *VAR.values()])
def test_presets_for_every_schedule(name, schedule):
    plan = parse_plan(f"{name} + drop_uncond(1)", schedule, 8)
    draws_last = len(plan.steps) == len(schedule)  # rows are dropped of scales of the schedule
    assert (plan.steps[-1].rows == "cond") == (draws_last or name == "balanced")
    dense = parse_plan("drop_uncond(1)", schedule, 8)
    assert (plan.density() < dense.density()) == (name != "dense")
    assert plan.describe()


def test_text_joins_policies():
    text = "sparvar(2, form='boxes', columns_options={'granularity': 8, 'multiple': 64})"
    plan = parse_plan(f" {text} + skip_last_scales(1)+drop_uncond(2) ", SQUARE, 8)
    assert [step.rows for step in plan.steps[-2:]] == ["both", "cond"]
    assert len(plan.steps) == 12
    assert plan.name == f"{text} + skip_last_scales(1)+drop_uncond(2)"
    assert parse_plan("csla(windows=[1, 3], sinks=0)", SQUARE, 2) == csla((1, 3), 0)(
        dense_plan(SQUARE, 2)
    )
    assert hash(plan) == hash(parse_plan(plan.name, SQUARE, 8))


def test_implementation_reaches_every_attention():
    plan = parse_plan("sparvar-fast", SQUARE, 8, implementation="xla")
    names = {s.attention.implementation for step in plan.steps for s in step.segments}
    assert names == {"xla"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparvar-best", "unknown policy 'sparvar-best': use one of almost-lossless"),
        ("csla(", "unknown policy"),
        ("csla(sinks=open('x'))", "literal arguments"),
        ("csla(colour=3)", "colour"),
        ("csla()(1)", "literal arguments"),
        ("", "unknown policy ''"),
    ],
)
def test_text_refusals(text, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse_policy(text)


def test_skipping():
    plan = skip_last_scales(2)(dense_plan(SQUARE, 2))
    assert [step.scale.index for step in plan.steps] == list(range(11))
    assert plan.schedule is SQUARE
    assert skip_last_scales(1)(plan) == plan
    with pytest.raises(ValueError, match=r"0\.\.12"):
        skip_last_scales(13)(plan)


def test_dropping_rows():
    plan = drop_uncond(3)(dense_plan(SQUARE, 4, merge_at=1))
    assert [step.rows for step in plan.steps] == ["both"] * 10 + ["cond"] * 3
    assert [step.merge_at for step in plan.steps] == [1] * 10 + [None] * 3
    assert [len(step.segments) for step in plan.steps] == [2] * 10 + [1] * 3
    assert plan.density() == 0.5
    with pytest.raises(ValueError, match="number of scales"):
        drop_uncond(14)(plan)


def test_skipping_the_decision_leaves_nothing_to_decide():
    plan = parse_plan("skip_last_scales(2) + sparvar-paper", SQUARE, 32)
    assert plan.steps[-1].segments[0].attention.name == "dense"
    later = parse_plan("sparvar-paper + skip_last_scales(2)", SQUARE, 32)
    assert later.live_after(10, 0) == frozenset()
